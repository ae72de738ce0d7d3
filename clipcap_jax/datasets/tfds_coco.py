"""COCO Captions that TFDS prepared, its `coco_captions`: the same pictures, captions and splits as `coco` reads.

    tfds build coco_captions --file_format=array_record

writes what is read here without TensorFlow. TFDS's usual tfrecord files are read too where TensorFlow is installed.
"""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from clipcap_jax.datasets import coco, schema
from clipcap_jax.datasets.readers import not_there
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import PICTURES_PER_SHARD, Part, Problem, Source, broken_picture
from clipcap_jax.datasets.tidy import clean_captions
from clipcap_jax.errors import UserError

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

LISTING = """\
  coco_captions/2014/1.1.0/dataset_info.json ...   written by: tfds build coco_captions --file_format=array_record"""


def tfds_coco_source(manual_dir: str | Path) -> Source:
    """TFDS's `coco_captions`, as the data set "coco".

    Args:
      manual_dir: TFDS's data_dir, in which `LISTING` lies, or the folder that holds dataset_info.json itself.

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
        origin={"tfds": info.full_name, "sizes": sizes},
        found={"images": str(folder)},
        parts=[
            Part(
                split,
                functools.partial(read_stretch, folder, name, start, min(start + PICTURES_PER_SHARD, sizes[name])),
            )
            for name, split in _SPLITS.items()
            for start in range(0, sizes[name], PICTURES_PER_SHARD)
        ],
        has_images=True,
        notes=[] if counts == coco.COUNTS else [f"this is not the COCO that was published: {said}"],
        description=coco.DESCRIPTION,
        homepage=coco.HOMEPAGE,
        citation=coco.CITATION,
    )


def read_stretch(folder: Path, tfds_split: str, start: int, stop: int) -> Iterator[Example | Problem]:
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
        if problem := broken_picture(row["image"], where, row["image/filename"].decode()):
            yield problem
            continue
        image_id = str(row["image/id"])
        captions, problems = clean_captions([text.decode() for text in row["captions"]["text"]], where, image_id)
        yield from problems
        if captions:
            yield Example(
                image=row["image"],
                embedding=None,
                image_path="",
                image_id=image_id,
                captions=tuple(captions),
                domain="",
            )


def _find(place: Path) -> Path:
    if (place / "dataset_info.json").is_file():
        return place.resolve()
    folder = place / "coco_captions" / "2014"
    versions = tfds.core.utils.version.list_all_versions(tfds.core.Path(folder)) if folder.is_dir() else []
    if not versions:
        raise not_there(place, "TFDS's coco_captions", LISTING)
    return (folder / str(versions[-1])).resolve()
