"""Writing a data set shard by shard, in TFDS's format, so that a stop loses the shards under way and nothing else.

TFDS's own writer deletes an unfinished preparation. Here shards gather in the folder `<version>.unfinished`; each gets
its name only once it is whole, and then a note beside it says what it holds. When all are there, TFDS's metadata are
added and the folder gets its own name: whoever reads sees a whole data set or none.
"""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info, example_serializer, naming
from tensorflow_datasets.core import splits as tfds_splits

from clipcap_jax import files
from clipcap_jax.datasets import schema
from clipcap_jax.datasets.source import Part, Problem, Source
from clipcap_jax.errors import UserError
from clipcap_jax.progress import track

VERSION = "1.0.0"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a finished shard holds.

    Attributes:
      images, captions: how many.
      bytes: the size of the file.
      sha256: of its bytes.
      words: how many captions have how many words.
      problems: what was skipped.
    """

    images: int
    captions: int
    bytes: int
    sha256: str
    words: dict[int, int]
    problems: list[Problem]


class Writer:
    """The folder that the shards of one data set gather in.

    Any number of processes, on hosts that see the same disk, may write different shards at the same time.
    """

    def __init__(self, source: Source, data_dir: str) -> None:
        self.source = source
        self.data_dir = Path(data_dir).expanduser()
        self.folder = self.data_dir / source.name / VERSION
        self.unfinished = self.folder.with_name(f"{VERSION}.unfinished")
        self.shards = self.notes = tfds.core.Path(self.unfinished)  # where those lie
        counts = Counter(part.split for part in source.parts)
        numbers: Counter[str] = Counter()
        self._splits = [part.split for part in source.parts]
        self.names: list[str] = []  # of the parts' files
        for part in source.parts:
            path = _template(source, self.unfinished, part.split).sharded_filepath(
                shard_index=numbers[part.split], num_shards=counts[part.split]
            )
            self.names.append(path.name)
            numbers[part.split] += 1
        # Where pictures are looked up decides nothing once all is there, but shards of two folders must not be mixed.
        origin = {**source.origin, "images from": source.found.get("images")}
        self._plan = {"origin": json.loads(json.dumps(origin)), "shards": self.names}
        self._digest = hashlib.sha256(json.dumps(self._plan, sort_keys=True).encode()).hexdigest()

    def without_parts(self) -> Self:
        """For another process that writes, and is given the parts one by one: they may hold every record."""
        light = copy.copy(self)
        light.source = dataclasses.replace(self.source, parts=(), problems=())
        return light

    @contextlib.contextmanager
    def locked(self, work: str = "", *, wait: bool = False) -> Iterator[None]:
        """Keeps out other processes that do the same work, such as a share of the shards; "": all of it.

        Raises:
          UserError: there is one; unless this shall `wait` for it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.locked(self.folder.with_name(f"{VERSION}{work}.lock"), wait=wait):
                yield
        except BlockingIOError:
            busy = f"{self.source.name} is being prepared in {self.data_dir} by another process."
            raise UserError(busy) from None

    def is_shared(self, work: str) -> bool:
        """Whether another process holds a lock for its work, such as a share of the shards; `work` is this one's."""
        for path in self.folder.parent.glob(f"{VERSION}*.lock"):
            if path.name not in (f"{VERSION}.lock", f"{VERSION}{work}.lock"):
                try:
                    with files.locked(path, wait=False):
                        pass
                except BlockingIOError:
                    return True
        return False

    def begin(self, *, alone: bool) -> None:
        """Make the folder, or go on with one that was begun for the same source.

        Args:
          alone: no other process writes to it, so that it may be begun anew where nothing in it is finished.

        Raises:
          UserError: it was begun for another one, or its place is taken.
        """
        for left in self.unfinished.glob("plan.json.*.tmp"):
            left.unlink(missing_ok=True)
        for left in self.folder.parent.glob(f"{VERSION}.*.tmp"):  # a data set that was replaced
            if not self.folder.exists() and schema.is_finished(left):
                left.rename(self.folder)  # killed just before the new one took its place
            shutil.rmtree(left, ignore_errors=True)
        if not schema.is_finished(self.folder) and any(path.name != "columns" for path in self.folder.glob("*")):
            raise UserError(f"{self.folder} holds a part of a data set: delete it to prepare it again.")
        path = self.unfinished / "plan.json"
        if alone and path.exists():
            before = json.loads(path.read_text())
            renewed = before != self._plan and same_but(self.source.renewed, before["origin"], self._plan["origin"])
            if renewed or not any(self.unfinished.glob("*.note.json")):
                path.unlink()
        if not path.exists():
            self.discard()  # it may be what another deletion has left
            self.unfinished.mkdir(parents=True)
            _write_whole(path, json.dumps(self._plan))
        begun = json.loads(path.read_text())
        if begun != self._plan:
            raise UserError(
                f"{self.source.name} was begun, but not finished, from something else"
                f"{changes(begun['origin'], self._plan['origin'])}. Go on with that, or delete {self.unfinished}."
            )

    def clear(self, indices: Iterable[int]) -> None:
        """Remove what killed processes left of the shards of these parts; nobody else may be writing them."""
        for index in indices:
            for left in self.unfinished.glob(f"{glob.escape(self.names[index])}.*.tmp"):
                left.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what was written so far."""
        if self.unfinished.exists():
            shutil.rmtree(self.unfinished)

    def forget(self, index: int) -> None:
        """Take the shard of a part for not written."""
        self._note(index).unlink(missing_ok=True)

    def finished(self, index: int, part: Part) -> Shard | None:
        """What the shard of this part holds, if it is whole."""
        try:
            note = json.loads(self._note(index).read_text())
            fields = note["shard"]
            fields["words"] = {int(length): count for length, count in fields["words"].items()}
            fields["problems"] = [Problem(**problem) for problem in fields["problems"]]
            shard = Shard(**fields)
            whole = (self.shards / self.names[index]).stat().length == shard.bytes
            same = note["plan"] == self._digest and note["part"] == part.holds  # it may be left of others
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return shard if whole and same else None

    def ids(self, index: int) -> list[str]:
        """The image_id of every example of a finished shard."""
        ids: list[str] = json.loads(self._note(index).read_text())["ids"]
        return ids

    def _note(self, index: int) -> tfds.core.Path:
        return self.notes / f"{self.names[index]}.note.json"

    def part_file(self, index: int) -> tfds.core.Path:
        """Where a process on another machine finds the part that it shall write."""
        return self.notes / f"{self.names[index]}.part"

    def write(self, index: int, part: Part) -> Shard:
        """Write the shard of a part.

        Args:
          index: the part's number.
          part: gives what it holds.

        Raises:
          OSError: the disk is full, or a file cannot be read or written.
        """
        split, path = self._splits[index], self.unfinished / self.names[index]
        features = schema.features(self.source.has_images, self.source.embedding_width)
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        ids: list[str] = []
        words: Counter[int] = Counter()
        problems: list[Problem] = []

        temporary = _temporary(path)
        try:
            # As TFDS's writer, but pictures are compressed already: to try it again costs more than to write them.
            options = "group_size:1" + ",uncompressed" * self.source.has_images
            file = _as_system(ArrayRecordWriter, str(temporary), options)
            try:
                for example in part.read():
                    if isinstance(example, Problem):
                        problems.append(example)
                        continue
                    ids.append(example.image_id)
                    words.update(len(caption.split()) for caption in example.captions)
                    fields = features.encode_example(schema.to_fields(example, split))
                    # As `serialize_example` does, but the same bytes every time: a proto's map has no order.
                    record = serializer.get_tf_example(fields).SerializeToString(deterministic=True)
                    _as_system(file.write, record)
            finally:
                _as_system(file.close)
            _to_disk(temporary)
            shard = Shard(
                images=len(ids),
                captions=words.total(),
                bytes=temporary.stat().st_size,
                sha256=files.digest(temporary),
                words=dict(words),
                problems=problems,
            )
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        note = {"plan": self._digest, "part": part.holds, "shard": dataclasses.asdict(shard), "ids": ids}
        _write_whole(Path(self._note(index)), json.dumps(note))
        return shard

    def describe(self, shards: list[Shard], metadata: Mapping[str, Any]) -> None:
        """Add TFDS's metadata.

        Args:
          shards: what the shards of all parts hold.
          metadata: what to store beside the examples, as JSON values.
        """
        by_split: dict[str, list[Shard]] = {}
        for part, shard in zip(self.source.parts, shards, strict=True):
            by_split.setdefault(part.split, []).append(shard)
        # TFDS cannot open a split of none.
        by_split = {split: held for split, held in by_split.items() if any(shard.images for shard in held)}
        dataset, _, config = self.source.name.partition("/")
        # As TFDS's own folder_dataset.write_metadata does, which wants all shards in one folder with the metadata.
        info = tfds.core.DatasetInfo(
            builder=dataset_info.DatasetIdentity(
                name=dataset,
                version=tfds.core.Version(VERSION),
                data_dir=str(self.folder),
                module_name="",
                config_name=config or None,
            ),
            features=schema.features(self.source.has_images, self.source.embedding_width),
            description=self.source.description,
            homepage=self.source.homepage,
            citation=self.source.citation,
        )
        info.set_file_format(schema.FILE_FORMAT)
        info.set_splits(
            tfds_splits.SplitDict(
                [
                    tfds_splits.SplitInfo(
                        name=split,
                        shard_lengths=[shard.images for shard in held],
                        num_bytes=sum(shard.bytes for shard in held),
                        filename_template=_template(self.source, self.unfinished, split),
                    )
                    for split, held in by_split.items()
                ]
            )
        )
        info.write_to_directory(self.unfinished)
        digests = {split: [shard.sha256 for shard in held] for split, held in by_split.items()}
        schema.seal(self.unfinished, {**metadata, "name": self.source.name, "shards": digests})

    def publish(self) -> Any:
        """Give the folder its name; what had it before, to be replaced, is removed. Returns the folder."""
        if self.folder.exists():  # to be replaced; or a reader of one that was deleted left its columns there
            before = _temporary(self.folder)
            self.folder.rename(before)
            self.unfinished.rename(self.folder)
            shutil.rmtree(before, ignore_errors=True)
        else:
            self.unfinished.rename(self.folder)
        sweep(self.folder)
        return self.folder


def sweep(folder: Path) -> None:
    """Remove from a finished data set what was of use while it was written."""
    for pattern in ("*.tmp", "*.note.json", "*.part", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def upload(folder: Path, target: Any) -> None:
    """Copy a finished data set to a remote folder; shards that an interrupted call has copied are not copied again.

    The file by which a data set is recognised goes last (see `schema.is_finished`).

    Raises:
      OSError: a file could not be read or written.
    """
    mark, digest = target / "upload.txt", files.digest(folder / "metadata.json")
    begun = mark.exists() and mark.read_text() == digest  # or what lies there may be of another data set
    target.mkdir(parents=True, exist_ok=True)
    (target / "dataset_info.json").unlink(missing_ok=True)  # of a data set that is replaced
    mark.write_text(digest)
    paths = sorted(folder.iterdir(), key=lambda path: path.name == "dataset_info.json")
    with contextlib.closing(track(paths, f"Copying to {target}", total=len(paths))) as shown:
        for path in shown:
            copy = target / path.name
            is_shard = f".{schema.FILE_FORMAT}-" in path.name
            if not (begun and is_shard and copy.exists() and copy.stat().length == path.stat().st_size):
                tfds.core.Path(path).copy(copy, overwrite=True)
    mark.unlink(missing_ok=True)  # another machine may have copied the same


def same_but(renewed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two origins differ in nothing but these values."""
    return {**before, **dict.fromkeys(renewed)} == {**now, **dict.fromkeys(renewed)}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two origins, such as ": seed was 1, is now 2"."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = "; ".join(f"{key} was {before.get(key)}, is now {now.get(key)}" for key in keys)
    return f": {told}" if told else ""


def _as_system(call: Callable[..., T], *arguments: Any) -> T:
    """Array_record raises a RuntimeError for whatever the system refuses; here it is an OSError, as elsewhere."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _template(source: Source, folder: Path, split: str) -> naming.ShardedFileTemplate:
    dataset = source.name.partition("/")[0]
    return naming.ShardedFileTemplate(
        dataset_name=dataset, data_dir=tfds.core.Path(folder), split=split, filetype_suffix=schema.FILE_FORMAT
    )


def _write_whole(path: Path, text: str) -> None:
    temporary = _temporary(path)
    temporary.write_text(text)
    _to_disk(temporary)
    temporary.rename(path)


def _temporary(path: Path) -> Path:
    """A name of its own: a process that was taken for dead may still be writing the same file."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _to_disk(path: Path) -> None:
    """What is renamed shall not turn out empty after a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
