"""The one schema of all data sets, and how prepared data are read.

A prepared data set is a folder `<data_dir>/<name>/<version>` as TFDS writes it, in the `array_record` format. An
example holds:

    image        encoded bytes (JPEG, PNG, ...)    left out where the data set stores no pictures
    embedding    float16, shape (E,)               left out where the data set stores no embeddings
    image_path   where the picture lies, from the data set's `root`, for pages that show it; "" where nowhere
    image_id     unique within the split
    captions     any number of texts, none where the references are not public
    split        "train", "val", "test"
    domain       a group to score apart, such as nocaps' "out-domain"; "" where there are none
    picture      the SHA-256 of the encoded picture, its first 32 hexadecimal digits; "" where there never was one

What is absent is absent from the whole data set: its TFDS features say so before a single example is read.

A data set is what it holds: `metadata.json` has the SHA-256 of every shard, and from these follows the `fingerprint`,
by which everything made from a data set is filed. It has those of TFDS's two files too, and its own.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import json_format
from tensorflow_datasets.proto import tf_example_pb2

from clipcap_jax import files, pictures
from clipcap_jax.errors import UserError

FILE_FORMAT = "array_record"  # random access, and readable without TensorFlow

_OPEN_FILES = 2**16

READ_AT_ONCE = 1000  # examples, when all are read

_TEXTS = ("image_path", "image_id", "split", "domain", "picture")
_DESCRIPTIONS = ("dataset_info.json", "features.json")


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and what is said about it."""

    image: bytes | None  # as encoded; see clipcap_jax.pictures.decode
    embedding: np.ndarray | None  # float16, shape (E,), read-only
    image_path: str  # from the data set's `root`
    image_id: str
    captions: tuple[str, ...]
    domain: str
    picture: str = ""  # filled in where the image is stored


def features(has_images: bool, embedding_width: int | None) -> tfds.features.FeaturesDict:
    """The schema as TFDS features.

    Args:
      has_images: whether examples hold the encoded picture.
      embedding_width: E, or None where examples hold no embedding.
    """
    fields: dict[str, Any] = {key: tfds.features.Text() for key in _TEXTS}
    fields["captions"] = tfds.features.Sequence(tfds.features.Text())
    if has_images:
        fields["image"] = tfds.features.Image()
    if embedding_width is not None:
        # As bytes: TFDS would store float16 numbers as float32, twice the size.
        fields["embedding"] = tfds.features.Tensor(shape=(embedding_width,), dtype=np.float16, encoding="bytes")
    return tfds.features.FeaturesDict(fields)


def to_fields(example: Example, split: str) -> dict[str, Any]:
    """An example as `features` encodes it."""
    fields: dict[str, Any] = {
        "image_path": example.image_path,
        "image_id": example.image_id,
        "captions": example.captions,
        "split": split,
        "domain": example.domain,
        "picture": example.picture,
    }
    if example.image is not None:
        fields["image"] = example.image
        fields["picture"] = pictures.digest(example.image)
    if example.embedding is not None:
        fields["embedding"] = example.embedding
    return fields


class Split(Sequence[Example]):
    """One split of a prepared data set, read at random; any number of threads may read at once.

    Opening it opens no file: shards are opened when an example of theirs is asked for, and stay open. A shard is used
    only if the data set is still the same after it was opened: where it was prepared anew in the meantime, shards that
    are open still give the old examples, and another one is an error.

    Attributes:
      name: the data set, such as "records/flickr8k".
      split: "train", "val[:100]", ...
      has_images: whether its examples hold the encoded picture.
      embedding_width: E, or None where its examples hold no embedding.
      encoder: what made the embeddings, such as "ViT-B/32"; None where that is not known or there are none.
      root: the folder that the pictures lay in, which `image_path` starts from; "" where they lie nowhere.
      fingerprint: of the data set, as `fingerprint` gives it.
      folder: where the data set lies.
      whole: the split that it is, or that it is a part of.
      start, stop: its place in the whole split.
      shards: the files of the whole split.
      shard_lengths: the examples in each.
    """

    def __init__(self, name: str, split: str, builder: tfds.core.DatasetBuilder) -> None:
        self.name = name
        self.split = split
        self.has_images = "image" in builder.info.features
        self.embedding_width: int | None = (
            builder.info.features["embedding"].shape[0] if "embedding" in builder.info.features else None
        )
        metadata = builder.info.metadata
        self.encoder: str | None = metadata["encoder"]
        self.root: str = metadata["root"]
        self.fingerprint = fingerprint(metadata)
        self.folder: tfds.core.Path = builder.data_path
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(dict(builder.info.splits))
        if len(parts) > 1:
            raise ValueError("these are several parts; it takes one")
        info = builder.info.splits[parts[0].splitname]
        self.whole: str = info.name
        self.start: int = parts[0].from_ or 0
        self.stop: int = info.num_examples if parts[0].to is None else parts[0].to
        if self.stop <= self.start:
            raise ValueError("it holds no examples")
        self.shards: list[tfds.core.Path] = info.filepaths
        self.shard_lengths: list[int] = info.shard_lengths
        self._digests: list[str] = metadata["shards"][self.whole]
        _allow_open_files()
        self._ends = list(itertools.accumulate(self.shard_lengths))
        self._opened: dict[int, ArrayRecordDataSource] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        # The range: negative indices, and IndexError at the end.
        place = self.start + range(len(self))[index]
        shard = bisect.bisect_right(self._ends, place)
        with _reading(self.shards[shard]):
            # If two threads come here at once, the second's is thrown away.
            opened = self._opened.get(shard) or self._opened.setdefault(shard, self._open(shard))
            return _parse(opened[place - self._ends[shard] + self.shard_lengths[shard]])

    def _open(self, shard: int) -> ArrayRecordDataSource:
        path = self.shards[shard]
        local = files.local_copy(path, self._digests[shard])
        opened = ArrayRecordDataSource(f"{local}[0:{self.shard_lengths[shard]}]")
        opened[0]  # only now is the file open
        if not files.is_remote(path):  # else it was compared with its digest
            self._check_same()
        return opened

    def _check_same(self) -> None:
        now = _read_metadata(self.folder)
        if "shards" not in now or fingerprint(now) != self.fingerprint:
            raise UserError(
                f"{self.folder} was deleted or prepared anew while it was read, with other content. Start again."
            )

    def read_whole(self) -> Iterator[list[Example]]:
        """All examples of the whole split, at most `READ_AT_ONCE` at a time; remote shards pass through a temporary
        folder."""
        with tempfile.TemporaryDirectory() as scratch:
            for shard, (path, length) in enumerate(zip(self.shards, self.shard_lengths, strict=True)):
                local = Path(path)
                if files.is_remote(path):
                    local = Path(scratch) / path.name
                    files.copy_checked(path, local, self._digests[shard])
                else:
                    with _reading(path):
                        if files.digest(local) != self._digests[shard]:  # it may just be copied here
                            self._check_same()
                            raise RuntimeError("it is not what was written")
                with _reading(path), ArrayRecordDataSource(f"{local}[0:{length}]") as records:
                    for start in range(0, length, READ_AT_ONCE):
                        stop = min(start + READ_AT_ONCE, length)
                        yield [_parse(record) for record in records.__getitems__(range(start, stop))]
                if local != Path(path):
                    local.unlink()
        if not files.is_remote(self.folder):
            self._check_same()


def _allow_open_files() -> None:
    """Raise this process's limit to what the shards of some data sets need; often it is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _reading(shard: Any) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:  # the first is array_record's word for whatever is wrong
        raise UserError(
            f"The shard {shard} cannot be read: {error}. If it is missing or damaged, delete the folder it lies in and "
            "prepare the data set again; if too many files are open, `ulimit -n` raises their number."
        ) from error


def _parse(record: bytes) -> Example:
    """An example as TFDS stores it; its own `deserialize_example_np` gives the same, more slowly."""
    feature = tf_example_pb2.Example.FromString(record).features.feature

    def value(key: str) -> bytes | None:
        return feature[key].bytes_list.value[0] if key in feature else None

    if "image_id" not in feature:  # array_record gives this for a file that ends after 64 KiB
        raise RuntimeError("a record is empty")
    image_path, image_id, domain, picture = (
        str(value(key) or b"", "utf-8") for key in ("image_path", "image_id", "domain", "picture")
    )
    embedding = value("embedding")
    return Example(
        image=value("image"),
        embedding=None if embedding is None else np.frombuffer(embedding, np.float16),
        image_path=image_path,
        image_id=image_id,
        captions=tuple(caption.decode() for caption in feature["captions"].bytes_list.value),
        domain=domain,
        picture=picture,
    )


def open_split(name: str, split: str, data_dir: str) -> Split:
    """Opens a split of a prepared data set.

    Args:
      name: the data set as TFDS names it: "shapes", or builder and config as in "records/flickr8k".
      split: "train", "val", "test", or a part of one as TFDS writes it: "val[:100]".
      data_dir: the folder that data sets were prepared in.

    Raises:
      UserError: the data set is not there, has no such split, or is not in this schema.
    """
    builder = open_builder(name, data_dir)
    if split.split("[")[0] not in builder.info.splits:
        raise UserError(f"{name} has no split {split!r}. It has: {', '.join(builder.info.splits)}.")
    try:
        return Split(name, split, builder)
    except ValueError as error:  # TFDS explains what is wrong with a part such as "val[:x]"
        raise UserError(f"{name}: split {split!r} cannot be read: {error}") from error


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Opens the newest version of a prepared data set; as `open_split`, for its metadata and the list of its splits."""
    files.check_utf8(data_dir)
    with files.reached(data_dir):
        folder = tfds.core.Path(data_dir).expanduser() / name
        versions = tfds.core.utils.version.list_all_versions(folder)  # the newest last
        versions = [version for version in versions if is_finished(folder / str(version))]
    if not versions:
        raise UserError(f"The data set {name!r} is not prepared in {data_dir}. {_how_to_prepare(name, data_dir)}")
    folder = folder / str(versions[-1])
    before = check_metadata(folder)
    builder = read_builder(folder)
    if not before == check_metadata(folder) == builder.info.metadata.get("digest"):
        raise UserError(f"{folder} was deleted or prepared anew while it was opened. Start again.")
    info = builder.info
    missing = {*_TEXTS, "captions"} - set(info.features)
    if missing:
        raise UserError(
            f"{info.data_dir} is not in the schema of clipcap_jax: it has no {', '.join(sorted(missing))}. "
            "Prepare the data with clipcap_jax.datasets, for instance as `records`."
        )
    if info.file_format.value != FILE_FORMAT:
        raise UserError(
            f"{info.data_dir} is in the format {info.file_format.value}, which needs TensorFlow. "
            f"Prepare it again with file_format={FILE_FORMAT!r}."
        )
    require_metadata(builder)
    return builder


def require_metadata(builder: tfds.core.DatasetBuilder) -> None:
    """Raise a UserError if a data set does not say what it holds."""
    if "digest" not in (builder.info.metadata or {}):
        raise UserError(
            f"{builder.data_path} lacks its metadata.json, or was prepared by an earlier version: delete it to prepare "
            "it again."
        )


def read_builder(folder: Any) -> tfds.core.DatasetBuilder:
    """The data set that lies in a folder, perhaps a remote one.

    Raises:
      UserError: its metadata cannot be read.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        _ = builder.info.metadata, builder.info.features  # read now
    except (FileNotFoundError, KeyError, ValueError, json_format.Error) as error:
        raise UserError(
            f"{folder} is damaged: its metadata cannot be read ({error}). Delete it and prepare the data set again."
        ) from error
    return builder


def is_finished(folder: Any) -> bool:
    """Whether a data set lies in a folder, perhaps a remote one: of such a data set, this file is copied last."""
    return bool((folder / "dataset_info.json").exists())


def fingerprint(metadata: Mapping[str, Any]) -> str:
    """What tells data sets apart: a hash of the digests of their shards, and of what made the embeddings."""
    return hash_of([metadata["shards"], metadata["encoder"]])[:16]


def hash_of(value: Any) -> str:
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `metadata.json` with the digests of what lies beside it, and its own."""
    described = {name: files.digest(folder / name) for name in _DESCRIPTIONS}
    content = {**json.loads(json.dumps(metadata)), "descriptions": described}
    (folder / "metadata.json").write_text(json.dumps(content | {"digest": hash_of(content)}, indent=1))


def check_metadata(folder: Any) -> str | None:
    """The digest in `metadata.json`; None where the data set is none of ours, or an earlier version's.

    Raises:
      UserError: a file that describes the data set has other bytes than were written.
    """
    content = _read_metadata(folder)
    digest = content.pop("digest", None)
    if "descriptions" not in content:
        return None
    try:
        damaged = [name for name in _DESCRIPTIONS if files.digest(folder / name) != content["descriptions"].get(name)]
    except OSError as error:
        raise UserError(
            f"{folder} is damaged: its metadata cannot be read ({error}). Delete it and prepare the data set again."
        ) from error
    if hash_of(content) != digest:
        damaged = ["metadata.json"]
    if damaged:
        raise UserError(
            f"{folder} is damaged: its {damaged[0]} is not what was written. Delete it and prepare the data set again."
        )
    return str(digest)


def _read_metadata(folder: Any) -> dict[str, Any]:
    path = folder / "metadata.json"
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(
            f"{folder} is damaged: its metadata cannot be read ({error}). Delete it and prepare the data set again."
        ) from error
    return content if isinstance(content, dict) else {}


def _how_to_prepare(name: str, data_dir: str) -> str:
    kind, _, rest = name.partition("/")
    options = {
        "records": f" --name {rest} --captions FILE --images FOLDER (or --embeddings FILE, or both)",
        "shapes": "",
    }
    if kind == "embeddings":
        return f"Make it with: clipcap embed DATASET --clip WEIGHTS --name {rest} --data-dir {data_dir}"
    if kind in options or kind in ("coco", "flickr8k", "flickr30k", "cc3m", "cc12m", "nocaps"):
        given = options.get(kind, " --manual-dir FOLDER")
        return f"Prepare it with: clipcap prepare {kind}{given} --data-dir {data_dir}"
    return "`clipcap prepare --help` lists what can be prepared."
