"""What the readers of the field's data sets share: their owners' files, and records made of them."""

import dataclasses
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_jax.datasets.source import Problem, Record
from clipcap_jax.errors import UserError

_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclasses.dataclass(frozen=True)
class OwnersFile:
    """A file as its owner offers it: on its own, or still in a zip (then `member` is its path there)."""

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name or self.path.name

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        if not self.member:
            return self.path.read_bytes()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{self} cannot be read: {error}. Copy or download {self.path.name} again.") from None

    def text(self) -> str:
        """Its text, without a byte order mark.

        Raises:
          UserError: it is not UTF-8.
        """
        data = self.read()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(f"{self}:{line}: not UTF-8 (byte {data[error.start]:#x}).") from None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Where each line is that is not blank, and the line."""
        for number, line in enumerate(self.text().split("\n"), start=1):
            if line.strip():
                yield f"{self.name}:{number}", line.rstrip("\r")

    def json(self) -> dict[str, Any]:
        """The object that it holds.

        Raises:
          UserError: it holds something else.
        """
        try:
            content = json.loads(self.text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self} is not JSON: {error}.") from None
        if not isinstance(content, dict):
            raise UserError(f"{self} is not the file it should be: it holds no object {{...}}.")
        return content

    def objects(self, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """The list of objects under a key of its content.

        Raises:
          UserError: there is none.
        """
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{self} is not the file it should be: it has no list of objects {key!r}.")
        return entries

    def digest(self) -> str:
        """Its SHA-256, for `Source.origin`."""
        return f"SHA-256 {hashlib.sha256(self.read()).hexdigest()[:16]}"


def find_file(folder: Path, name: str, archive: str = "") -> OwnersFile | None:
    """A file in the folder, in `annotations/` below it, or in a zip there.

    Raises:
      UserError: the zip cannot be read.
    """
    for place in (folder, folder / "annotations"):
        if (place / name).is_file():
            return OwnersFile(place / name)
    if not archive or not (folder / archive).is_file():
        return None
    try:
        with zipfile.ZipFile(folder / archive) as file:
            # macOS puts a "._name" beside every file of a zip.
            members = [member for member in file.namelist() if PurePosixPath(member).name == name]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{folder / archive} is not a whole zip: {error}. Copy or download it again.") from None
    return OwnersFile(folder / archive, members[0]) if members else None


def not_there(folder: Path, dataset: str, listing: str) -> UserError:
    """The error that says what to put where."""
    return UserError(f"{folder} does not hold {dataset}. Put there:\n\n{listing}\n")


def join_captions(
    file: OwnersFile, images: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[Any]], list[Problem]]:
    """The captions of each image of a file in COCO's format, by its id; and those of images that it does not list."""
    by_id: dict[str, list[Any]] = {str(image.get("id")): [] for image in images}
    problems = []
    for index, annotation in enumerate(captions):
        if (image_id := str(annotation.get("image_id"))) in by_id:
            by_id[image_id].append(annotation.get("caption", ""))
        else:
            where = f"{file.name}: annotations[{index}]"
            problems.append(Problem(where, "caption of an unknown image", f"image_id {image_id}"))
    return by_id, problems


def read_karpathy(file: OwnersFile, dataset: str) -> list[Record | Problem]:
    """The pictures of one of the files in Karpathy's caption_datasets.zip; "restval" is "train".

    A picture is `{"filepath" (COCO only), "filename", "cocoid" (COCO only), "split", "sentences": [{"raw"}]}`.
    https://cs.stanford.edu/people/karpathy/deepimagesent/

    Args:
      file: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json.
      dataset: "coco", "flickr8k" or "flickr30k".

    Raises:
      UserError: it is the file of another data set, or none.
    """
    content = file.json()
    if content.get("dataset") != dataset:
        is_of = content.get("dataset")
        raise UserError(f"{file} is not Karpathy's file of {dataset}: its field 'dataset' is {is_of!r}.")
    rows: list[Record | Problem] = []
    for index, image in enumerate(file.objects(content, "images")):
        where = f"{file.name}: images[{index}]"
        name, sentences = image.get("filename"), image.get("sentences")
        split = _KARPATHY_SPLITS.get(str(image.get("split")))
        if split is None:
            rows.append(Problem(where, "wrong split", f"{image.get('split')!r}"))
        elif not isinstance(name, str) or not isinstance(sentences, list):
            rows.append(Problem(where, "missing field", "'filename' or 'sentences'"))
        else:
            rows.append(
                Record(
                    where,
                    f"{image['filepath']}/{name}" if image.get("filepath") else name,
                    str(image.get("cocoid")) if dataset == "coco" else Path(name).stem,
                    [sentence.get("raw", "") if isinstance(sentence, dict) else "" for sentence in sentences],
                    split,
                )
            )
    return rows


def tidy(rows: Iterable[Record | Problem], captioned: bool = True) -> tuple[list[Record], list[Problem]]:
    """Records whose captions have their white space tidied, each picture once, and what was left out.

    A picture that is in train and in another split stays in the other.

    Args:
      rows: records as a file has them, whatever its captions are, and problems met on the way.
      captioned: whether a record without captions is a problem.
    """
    problems: list[Problem] = []
    by_id: dict[str, Record] = {}
    by_file: dict[str, Record] = {}
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        if fault := _fault(row):
            problems.append(Problem(row.where, *fault))
            continue
        rivals = [rival for rival in (by_id.get(row.image_id), by_file.get(row.image)) if rival is not None]
        first = next((rival for rival in rivals if rival.split != "train" or row.split == "train"), None)
        if first is not None:
            problems.append(_twice(row, first))
            continue
        for rival in rivals:
            if by_id.pop(rival.image_id, None) is not None:
                del by_file[rival.image]
                problems.append(_twice(rival, row))
        by_id[row.image_id] = by_file[row.image] = row
    records = []
    for record in by_id.values():
        texts = [" ".join(caption.split()) for caption in record.captions]
        record.captions = [text for text in texts if text]
        if empty := len(texts) - len(record.captions):
            problems.append(Problem(record.where, "empty caption", f"image_id {record.image_id}", empty))
        if captioned and not texts:
            problems.append(Problem(record.where, "no caption", f"image_id {record.image_id}"))
        if record.captions or not captioned:
            records.append(record)
    return records, problems


def _fault(record: Record) -> tuple[str, str] | None:
    """What is wrong with what a JSON file says of a picture; it may hold anything."""
    texts: Sequence[Any] = [record.image, record.image_id, record.domain, *record.captions]
    if not all(isinstance(text, str) for text in texts):
        return "wrong type", "captions and file name must be texts"
    if not record.image or record.image_id in ("", "None"):
        return "missing field", "the file name or the id"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        return "broken text", "a character is cut in half"
    return None


def _twice(record: Record, first: Record) -> Problem:
    if record.split != first.split:
        detail = f"{record.image_id} is in {record.split!r}, but in {first.split!r} in {first.where}"
        return Problem(record.where, "image in two splits", detail)
    if record.image_id != first.image_id:
        detail = f"{record.image} is {record.image_id}, but {first.image_id} in {first.where}"
        return Problem(record.where, "image under two ids", detail)
    return Problem(record.where, "duplicate image_id", f"{record.image_id}, as in {first.where}")


def check_counts(dataset: str, records: Sequence[Record], published: Mapping[str, int]) -> list[str]:
    """A note where this is only a part of the data set.

    Raises:
      UserError: it is the whole of it, but its splits are not those that were published.
    """
    counts = Counter(record.split for record in records)
    if counts == published:
        return []
    said = ", ".join(f"{split} {counts[split]:,} of {count:,}" for split, count in published.items())
    if counts.total() == sum(published.values()):
        raise UserError(f"The splits of {dataset} are not those that were published: {said}.")
    return [f"this is not the {dataset} that was published: {said}"]
