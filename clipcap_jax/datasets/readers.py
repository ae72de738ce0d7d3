"""From people's files to records: every format is read into `Record`s, with a `Problem` for each that cannot be one.

`read_captions` reads the captions file of one's own data:

    .jsonl         an object a line, as Hugging Face's metadata.jsonl
    .csv, .tsv     a row a line, below a line that names the columns, as Hugging Face's metadata.csv
    .txt           the same with commas, which may also be in a caption that is not quoted: Kaggle's captions.txt
    .json          a list of objects (LAVIS, the original's train_caption.json), `{file: [captions]}`, COCO's `images`
                   and `annotations`, or Karpathy's `images` with `sentences`

An object or a row has these fields; others are ignored and told:

    image          file name in the image folder; also "file_name" or "filename"
    image_id       unique name of the picture; one of the two is needed, see `tidy.name_pictures`
    caption        a text, of which a picture may have several objects or rows, or a list of texts; also "text"
    captions       a list of texts (JSON only)
    split          "train", "val", "test" or any other word but "all"
    embedding_row  the picture's row in the matrix of embeddings, from 0
    domain         a group of pictures to score apart
    error          why there is no caption, as `clipcap caption` writes it
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_jax.datasets.source import Problem, Record
from clipcap_jax.errors import UserError

_NAMES = {"image": ("image", "file_name", "filename"), "caption": ("caption", "text")}
_OTHERS = ("image_id", "captions", "split", "embedding_row", "domain")

NO_CAPTION = "no caption"  # the reason of rows that say why

_Fields = tuple[str, Mapping[str, Any]]  # where an object or row is, and what it holds


class _Doubled(dict[str, Any]):
    """An object of JSON in which a key is twice; it holds what the key had first."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(reversed(pairs))
        self.keys_twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Doubled(pairs)


_JSON = json.JSONDecoder(object_pairs_hook=_object)


_LARGEST = 1 << 30  # bytes of a file in a zip, which a small zip can stand for many more of
_PIECE = 1 << 12  # bytes; of some methods, zipfile unpacks as much as these hold at once


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file on its own, or still in a zip (then `member` is its path there)."""

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
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                if archive.getinfo(self.member).file_size > _LARGEST:
                    raise UserError(f"{self} has more than {_LARGEST:,} bytes when unpacked: if it should, unpack it")
                return b"".join(iter(lambda: file.read(_PIECE), b""))
        except UserError:
            raise
        except Exception as error:  # on a damaged zip zipfile raises nearly anything
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
            byte = f"byte {data[error.start]:#x}"
            raise UserError(f"{self}:{line}: not UTF-8 ({byte}). Convert the file to UTF-8.") from None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Where each line is that is not blank, and the line."""
        name = self.name
        for number, line in enumerate(self.text().split("\n"), start=1):
            if line.strip():
                yield f"{name}:{number}", line.rstrip("\r")

    def values(self) -> Any:
        """The JSON value that it holds.

        Raises:
          UserError: it is not JSON.
        """
        try:
            return _JSON.decode(self.text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self} is not JSON: {error}.") from None

    def json(self) -> dict[str, Any]:
        """The object that it holds.

        Raises:
          UserError: it holds something else.
        """
        content = self.values()
        if not isinstance(content, dict):
            raise UserError(f"{self} is not the file it should be: it holds no object {{...}}.")
        return content

    def objects(self, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """The list of objects under a key of its content.

        Raises:
          UserError: there is none, or there are two.
        """
        entries = content.get(key)
        if isinstance(content, _Doubled) and key in content.keys_twice:
            raise UserError(f"{self} has the key {key!r} twice.")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{self} is not the file it should be: it has no list of objects {key!r}.")
        return entries

    def digest(self) -> str:
        """Its SHA-256, for `Source.origin`."""
        return f"SHA-256 {hashlib.sha256(self.read()).hexdigest()[:16]}"


def find_file(folder: Path, name: str, archive: str = "") -> TextFile | None:
    """A file in the folder, in `annotations/` below it, or in a zip there.

    Raises:
      UserError: the zip cannot be read.
    """
    for place in (folder, folder / "annotations"):
        if (place / name).is_file():
            return TextFile(place / name)
    if not archive or not (folder / archive).is_file():
        return None
    try:
        with zipfile.ZipFile(folder / archive) as file:
            # macOS puts a "._name" beside every file of a zip.
            members = [member for member in file.namelist() if PurePosixPath(member).name == name]
    except Exception as error:  # on a damaged zip zipfile raises nearly anything
        raise UserError(f"{folder / archive} is not a whole zip: {error}. Copy or download it again.") from None
    return TextFile(folder / archive, members[0]) if members else None


def not_there(folder: Path, dataset: str, listing: str) -> UserError:
    """The error that says what to put where."""
    return UserError(f"{folder} does not hold {dataset}. Put there:\n\n{listing}\n")


def read_captions(
    path: Path, image_field: str | None = None, caption_field: str | None = None
) -> tuple[list[Record | Problem], list[str]]:
    """The rows of a captions file in one of the formats above, in its order, and a note on fields that were not used.

    Args:
      path: the file.
      image_field, caption_field: what it calls the fields, where it is none of the names above.

    Raises:
      UserError: the file is missing, is in none of these formats, is not UTF-8, or lacks what every record needs.
    """
    if not path.is_file():
        raise UserError(f"The captions file {path} does not exist.")
    file, names = TextFile(path), dict(_NAMES)
    known = {*_OTHERS}
    if image_field:
        names["image"] = (image_field,)
    if caption_field:
        names["caption"] = (caption_field,)
        known -= {"captions"}
    readers = {".jsonl": _read_jsonl, ".json": _read_json}
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt"):
        found = _read_table(file, suffix, names)
    elif suffix in readers:
        found = readers[suffix](file)
    else:
        raise UserError(f"{path}: a captions file is .jsonl, .json, .csv, .tsv or .txt.")
    rows: list[Record | Problem] = []
    unused: dict[str, None] = {}
    for row in found:
        if isinstance(row, Problem):
            rows.append(row)
            continue
        where, fields = row
        if fields.get("error") and not any(fields.get(name) for name in (*names["caption"], "captions")):
            rows.append(Problem(row[0], NO_CAPTION, str(fields["error"])))
            continue
        meant = {key: fields[key] for key in known if key in fields}
        used = {*meant}
        for field, candidates in names.items():
            if name := next((name for name in candidates if fields.get(name) is not None), None):
                meant[field] = fields[name]
                used.add(name)
        left = dict.fromkeys(key for key in fields if key not in used)
        unused |= left
        record = make_record(where, fields if isinstance(fields, _Doubled) else meant)
        if isinstance(record, Problem) and record.reason == "missing field":
            hint = "; --image-field and --caption-field say which is which" if left else ""
            record = dataclasses.replace(record, detail=f"{record.detail}. It has: {_told(fields)}{hint}")
        rows.append(record)
    return rows, [f"fields of {path} that were not used: {_told(unused)}"] if unused else []


def make_record(where: str, fields: Mapping[str, Any]) -> Record | Problem:
    """The record of an object with the fields that the top of this file names, or why there is none.

    Its `image_id` is "" where the object has none. JSON may hold anything, so all types are checked.
    """
    if isinstance(fields, _Doubled):
        return Problem(where, "doubled key", f"{_told(fields.keys_twice)}: which is meant?")
    texts: dict[str, str] = {}
    for key in ("image", "image_id", "split", "domain"):
        value = fields.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            return Problem(where, "wrong type", f"{key!r} must be a text, is {value!r:.80}")
        texts[key] = "" if value is None else str(value).strip()
    if not texts["image"] and not texts["image_id"]:
        return Problem(where, "missing field", "neither 'image' nor 'image_id'")
    caption, captions = fields.get("caption"), fields.get("captions")
    if caption is not None and captions is not None:
        return Problem(where, "two fields", "both 'caption' and 'captions': which is meant?")
    if caption is None and captions is None:
        return Problem(where, "missing field", "neither 'caption' nor 'captions'")
    if captions is None:
        captions = caption if isinstance(caption, list) else [caption]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        return Problem(where, "wrong type", "'caption' must be a text, 'captions' a list of texts")
    if not re.fullmatch(r"([A-Za-z]\w*)?", texts["split"]):
        return Problem(where, "wrong split", f"{texts['split']!r} is not a word")
    row = fields.get("embedding_row")
    if isinstance(row, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", row):
        row = int(row)
    if row is not None and (not isinstance(row, int) or isinstance(row, bool)):
        return Problem(where, "wrong type", f"'embedding_row' must be a whole number, is {row!r:.80}")
    try:
        "".join([*texts.values(), *captions]).encode()
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        return Problem(where, "broken text", "a character is cut in half")
    image = texts["image"] or texts["image_id"]
    return Record(
        where=where,
        image=str(PurePosixPath(image)) if "/" in image else image,  # "./a.jpg" is "a.jpg"
        image_id=texts["image_id"],
        captions=list(captions),
        split=texts["split"],
        embedding_row=row,
        domain=texts["domain"],
        joins=isinstance(caption, str),
    )


def _told(names: Iterator[str] | Mapping[str, Any] | list[str]) -> str:
    """The first of some names, as they can be printed."""
    names = list(names)
    shown = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
    return shown.encode(errors="backslashreplace").decode() or "nothing"


def _read_jsonl(file: TextFile) -> Iterator[_Fields | Problem]:
    for where, line in file.lines():
        try:
            fields = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            yield Problem(where, "bad JSON", str(error).replace("line 1 ", ""))
            continue
        yield (where, fields) if isinstance(fields, dict) else Problem(where, "bad JSON", "not an object {...}")


def _read_table(file: TextFile, suffix: str, names: Mapping[str, tuple[str, ...]]) -> Iterator[_Fields | Problem]:
    """Rows of one line each: a quote that is not closed would take the rows below it into a caption."""
    lines = file.lines()
    _, header = next(lines, ("", ""))
    delimiter = ";" if ";" in header and "," not in header else ","  # Excel's, where a comma stands in numbers
    columns = [name.strip() for name in _cells(header, suffix, delimiter) or []]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{file}:1: the column {twice[0]!r} is there twice. Rename the one that is not meant.")
    captions = [name for name in (*names["caption"], "captions") if name in columns]
    if {"caption", "captions"} <= {*captions} and names["caption"] == _NAMES["caption"]:
        raise UserError(f"{file}:1: there are both 'caption' and 'captions': say --caption-field.")
    if not captions or not {*names["image"], "image_id"} & {*columns}:
        raise UserError(
            f"{file}:1: the first row must name the columns, among them {names['caption'][0]!r} and "
            f"{names['image'][0]!r} or 'image_id'. It has: {_told(columns)}. --image-field and --caption-field say "
            "which is which."
        )
    end = Problem("", "end of file", "")
    rows = (_read_row(where, line, suffix, delimiter, columns, captions[0]) for where, line in lines)
    for row, after in itertools.pairwise(itertools.chain(rows, [end])):
        if isinstance(row, Problem) or not isinstance(after, Problem) or after.reason != "too few columns":
            yield row
        elif any(cell.startswith('"') and cell.count('"') % 2 for cell in row[1].values()):
            yield Problem(row[0], "bad line", "a quote that is not closed in its line")  # the next line is its rest
        else:
            yield row


def _read_row(
    where: str, line: str, suffix: str, delimiter: str, columns: list[str], caption: str
) -> _Fields | Problem:
    cells = _cells(line, suffix, delimiter)
    if suffix == ".txt" and columns[-1] == caption and (cells is None or len(cells) > len(columns)):
        *names, text = line.split(delimiter, len(columns) - 1)
        open_quote = any('"' in name for name in names) or (text.startswith('"') and text.count('"') % 2)
        cells = None if open_quote else [_unquoted(cell) for cell in (*names, text)]
    if cells is None:
        return Problem(where, "bad line", "a quote that is not closed in its line, or text after one that is")
    if len(cells) > len(columns):
        return Problem(where, "too many columns", f"more than {len(columns)}; put a text with {delimiter!r} in quotes")
    if len(cells) < len(columns):
        return Problem(where, "too few columns", f"fewer than {len(columns)}")
    fields = {key: value for key, value in zip(columns, cells, strict=True) if value or key == caption}
    if caption == "captions":  # in a table, it is one text as well
        fields["caption"] = fields.pop(caption)
    return where, fields


def _cells(line: str, suffix: str, delimiter: str) -> list[str] | None:
    """The cells of a line, None where it is not CSV. In a TSV a quote is a letter unless the cell is wholly quoted."""
    if suffix == ".tsv":
        return [_unquoted(cell) for cell in line.split("\t")]
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _unquoted(cell: str) -> str:
    inner = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return inner[1].replace('""', '"') if inner else cell


def _read_json(file: TextFile) -> Iterator[_Fields | Problem]:
    content = file.values()
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        for index, entry in enumerate(content):
            yield f"{file.name}: [{index}]", entry
    elif isinstance(content, dict) and content and all(map(_is_texts, content.values())):
        for key in content.keys_twice if isinstance(content, _Doubled) else ():
            yield Problem(file.name, "doubled key", f"{_told([key])}, of which the first is kept")
        for index, (name, captions) in enumerate(content.items()):
            yield f"{file.name}: [{index}]", {"image": name, "caption": captions}
    elif not isinstance(content, dict) or not {"images", "annotations"} & content.keys():
        holds = f"an object with the keys {_told(content)}" if isinstance(content, dict) else "something else"
        raise UserError(
            f"{file} is no captions file: it holds neither a list of objects, nor {{file: [captions]}}, nor 'images' "
            f"and 'annotations' (COCO), nor 'images' with 'sentences' (Karpathy), but {holds}."
        )
    elif "annotations" not in content and any("sentences" in image for image in file.objects(content, "images")):
        yield from _karpathy(file, content)
    else:
        entries, problems = join_captions(file, content)
        yield from problems
        for where, image, captions in entries:
            fields = {key: image.get(key) for key in ("split", "embedding_row", "domain")}
            yield where, fields | {"image": image.get("file_name"), "image_id": image.get("id"), "captions": captions}


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def join_captions(
    file: TextFile, content: Mapping[str, Any]
) -> tuple[list[tuple[str, dict[str, Any], list[Any]]], list[Problem]]:
    """The images of a file in COCO's format: where each is, what the file says of it, and its captions.

    Also what is wrong: captions of images that the file does not list, ids of two images, whose captions may be
    either's, and objects with a key twice.

    Raises:
      UserError: a list is missing.
    """
    images, annotations = file.objects(content, "images"), file.objects(content, "annotations")
    files: dict[str, set[str]] = {}
    for image in images:
        if image.get("id") is not None:
            files.setdefault(str(image["id"]), set()).add(repr(image.get("file_name")))
    by_id: dict[str, list[Any]] = {image_id: [] for image_id in files}
    entries, problems = [], []
    for index, annotation in enumerate(annotations):
        where, image_id = f"{file.name}: annotations[{index}]", str(annotation.get("image_id"))
        if isinstance(annotation, _Doubled):
            problems.append(Problem(where, "doubled key", _told(annotation.keys_twice)))
        elif image_id in by_id:
            by_id[image_id].append(annotation.get("caption"))
        else:
            problems.append(Problem(where, "caption of an unknown image", f"image_id {image_id}"))
    for index, image in enumerate(images):
        where = f"{file.name}: images[{index}]"
        if isinstance(image, _Doubled):
            problems.append(Problem(where, "doubled key", _told(image.keys_twice)))
        elif len(files.get(image_id := str(image.get("id")), ())) > 1:
            detail = f"{image_id} is of {len(files[image_id])} files, whose captions cannot be told apart"
            problems.append(Problem(where, "duplicate image_id", detail))
        else:
            entries.append((where, image, by_id.get(str(image.get("id")), [])))
    return entries, problems


def read_karpathy(file: TextFile, dataset: str) -> list[Record | Problem]:
    """The pictures of one of the files in Karpathy's caption_datasets.zip.

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
    return [make_record(where, fields) for where, fields in _karpathy(file, content)]


def _karpathy(file: TextFile, content: Mapping[str, Any]) -> Iterator[_Fields]:
    for index, image in enumerate(file.objects(content, "images")):
        fields = {key: image.get(key) for key in ("split", "embedding_row", "domain")}
        folder, name, sentences = image.get("filepath"), image.get("filename"), image.get("sentences")
        fields["image"] = f"{folder}/{name}" if folder and isinstance(name, str) else name
        fields["image_id"] = image.get("cocoid")
        fields["captions"] = [*map(_raw, sentences)] if isinstance(sentences, list) else sentences
        yield f"{file.name}: images[{index}]", image if isinstance(image, _Doubled) else fields


def _raw(sentence: Any) -> Any:
    if isinstance(sentence, _Doubled):
        return None  # either of its texts may be meant
    return sentence.get("raw") if isinstance(sentence, dict) else sentence
