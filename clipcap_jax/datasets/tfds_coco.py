"""COCO Captions that TFDS prepared, its `coco_captions`: the same pictures, captions and splits as `coco` reads.

    tfds build coco_captions --file_format=array_record

writes what is read here without TensorFlow. TFDS's usual tfrecord files are read too where TensorFlow is installed.
"""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from clipcap_jax.datasets import annotations, coco, schema
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import PICTURES_PER_SHARD, Part, Problem, Source, broken_picture
from clipcap_jax.errors import UserError

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

LISTING = """\
  coco_captions/2014/1.1.0/dataset_info.json ...   written by: tfds build coco_captions --file_format=array_record"""


def tfds_coco_source(manual_dir: str | Path, store_images: bool = True) -> Source:
    """TFDS's `coco_captions`, as the data set "coco".

    Args:
      manual_dir: TFDS's data_dir, in which `LISTING` lies, or the folder that holds dataset_info.json itself.
      store_images: whether to copy the pictures into the data set.

    Returns:
      Its image_id is COCO's number; the order is TFDS's, "train" before "restval".

    Raises:
      UserError: there is no such folder, it holds another data set, or TensorFlow is needed to read it.
    """
    folder = _find(Path(manual_dir))
    info = schema.read_builder(folder).info
    if info.name != "coco_captions" or not _SPLITS.keys() <= info.splits.keys():
        raise UserError(f"{folder} holds {info.full_name}, not coco_captions with the splits {', '.join(_SPLITS)}.")
    if info.file_format.value != schema.FILE_FORMAT and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{folder} is in the format {info.file_format.value}, which needs TensorFlow: "
            'pip install "clipcap_jax[tensorflow]". '
            f"Or build it again with --file_format={schema.FILE_FORMAT}."
        )
    sizes = {name: info.splits[name].num_examples for name in _SPLITS}
    counts = dict.fromkeys(coco.COUNTS, 0)
    for name, split in _SPLITS.items():
        counts[split] += sizes[name]
    said = ", ".join(f"{split} {counts[split]:,} of {count:,}" for split, count in coco.COUNTS.items())
    return Source(
        name="coco",
        origin={"tfds": info.full_name, "store_images": store_images, "sizes": sizes},
        found={"images": str(folder)},
        parts=[
            Part(
                split,
                functools.partial(
                    read_stretch, folder, name, start, min(start + PICTURES_PER_SHARD, sizes[name]), store_images
                ),
            )
            for name, split in _SPLITS.items()
            for start in range(0, sizes[name], PICTURES_PER_SHARD)
        ],
        has_images=store_images,
        notes=[] if counts == coco.COUNTS else [f"this is not the COCO that was published: {said}"],
        description=coco.DESCRIPTION,
        homepage=coco.HOMEPAGE,
        citation=coco.CITATION,
    )


def read_stretch(
    folder: Path, tfds_split: str, start: int, stop: int, store_images: bool
) -> Iterator[Example | Problem]:
    """The pictures `start` to `stop` of one of TFDS's splits."""
    builder = schema.read_builder(folder)
    stretch = f"{tfds_split}[{start}:{stop}]"
    # Pictures are kept as they are encoded.
    options = {"split": stretch, "decoders": {"image": tfds.decode.SkipDecoding()}}
    if builder.info.file_format.value == schema.FILE_FORMAT:
        rows = builder.as_data_source(**options)
    else:
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        rows = tfds.as_numpy(builder.as_dataset(**options, read_config=in_order))
    for number, row in enumerate(rows, start=start):
        where = f"{builder.info.full_name}: {tfds_split}[{number}]"
        texts = [" ".join(text.decode().split()) for text in row["captions"]["text"]]
        captions = tuple(text for text in texts if text)
        if problem := broken_picture(row["image"], where, row["image/filename"].decode()):
            yield problem
            continue
        if len(captions) < max(len(texts), 1):
            image_id = row["image/id"]
            yield Problem(where, "empty caption" if texts else "no caption", f"image_id {image_id}")
        if captions:
            yield Example(
                image=row["image"] if store_images else None,
                embedding=None,
                image_path="",
                image_id=str(row["image/id"]),
                captions=captions,
                domain="",
            )


def _find(place: Path) -> Path:
    if (place / "dataset_info.json").is_file():
        return place.resolve()
    folder = place / "coco_captions" / "2014"
    versions = tfds.core.utils.version.list_all_versions(tfds.core.Path(folder)) if folder.is_dir() else []
    if not versions:
        raise annotations.not_there(place, "TFDS's coco_captions", LISTING)
    return (folder / str(versions[-1])).resolve()
