"""The one schema of all data sets, and how prepared data are read.

A prepared data set is a folder `<data_dir>/<name>/<version>` as TFDS writes it, in the `array_record` format. An
example holds:

    image        encoded bytes (JPEG, PNG, ...)    left out where the data set stores no pictures
    embedding    float16, shape (E,)               left out where the data set stores no embeddings
    image_path   where the picture lies, for pages that show it; "" where nowhere
    image_id     unique within the split
    captions     any number of texts, none where the references are not public
    split        "train", "val", "test"
    domain       a group to score apart, such as nocaps' "out-domain"; "" where there are none

What is absent is absent from the whole data set: its TFDS features say so before a single example is read.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds

from clipcap_jax.errors import UserError

FILE_FORMAT = "array_record"  # random access, and readable without TensorFlow

_TEXTS = ("image_path", "image_id", "split", "domain")


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and what is said about it."""

    image: bytes | None  # as encoded; see clipcap_jax.images.decode
    embedding: np.ndarray | None  # float16, shape (E,), read-only
    image_path: str
    image_id: str
    captions: tuple[str, ...]
    domain: str


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
    }
    if example.image is not None:
        fields["image"] = example.image
    if example.embedding is not None:
        fields["embedding"] = example.embedding
    return fields


class Split(Sequence[Example]):
    """One split of a prepared data set, read at random; any number of threads may read at once.

    Attributes:
      name: the data set, such as "records/flickr8k".
      split: "train", "val", ...
      has_images: whether its examples hold the encoded picture.
      embedding_width: E, or None where its examples hold no embedding.
      encoder: what made the embeddings, such as "ViT-B/32"; None where that is not known or there are none.
    """

    def __init__(self, name: str, split: str, builder: tfds.core.DatasetBuilder) -> None:
        self.name = name
        self.split = split
        self.has_images = "image" in builder.info.features
        self.embedding_width: int | None = (
            builder.info.features["embedding"].shape[0] if "embedding" in builder.info.features else None
        )
        self.encoder: str | None = builder.info.metadata.get("encoder")
        # TFDS's own decoding of pictures is not clipcap_jax.images.decode, so it hands over the bytes.
        decoders = {"image": tfds.decode.SkipDecoding()} if self.has_images else None
        self._source = builder.as_data_source(split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        record = self._source[range(len(self))[index]]  # the range: negative indices, and IndexError at the end
        return Example(
            image=record.get("image"),
            embedding=record.get("embedding"),
            image_path=record["image_path"].decode(),
            image_id=record["image_id"].decode(),
            captions=tuple(caption.decode() for caption in record["captions"]),
            domain=record["domain"].decode(),
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
    folder = tfds.core.Path(data_dir).expanduser() / name
    versions = tfds.core.utils.version.list_all_versions(folder)  # finished ones only, the newest last
    if not versions:
        raise UserError(f"The data set {name!r} is not prepared in {data_dir}. {_how_to_prepare(name, data_dir)}")
    builder = tfds.builder_from_directory(folder / str(versions[-1]))
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
    return builder


def fingerprint(builder: tfds.core.DatasetBuilder) -> str:
    """A hash of what TFDS's metadata say of a data set, its source and the lengths of its shards among it."""
    digest = hashlib.sha256()
    for name in ("dataset_info.json", "metadata.json", "features.json"):
        digest.update((tfds.core.Path(builder.data_dir) / name).read_bytes())
    return digest.hexdigest()[:16]


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
