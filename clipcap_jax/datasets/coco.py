"""COCO Captions with the splits of Karpathy and Fei-Fei (CVPR 2015), on which the field compares captioners.

train (Karpathy's "train" and "restval") 113,287 pictures, val 5,000, test 5,000, with five captions or a few more each.
"""

import hashlib
import re
from pathlib import Path

from clipcap_jax.datasets import annotations
from clipcap_jax.datasets.annotations import OwnersFile, find_file
from clipcap_jax.datasets.source import Problem, Record, Source, picture_parts
from clipcap_jax.errors import UserError

COUNTS = {"train": 113_287, "val": 5000, "test": 5000}
# SHA-256 of the ids in ascending order, one a line; from the lists in peteanderson80/Up-Down-Captioner.
_IDS = {
    "val": "47164ec8e9a973fe67d97bcea616ce5fe707b347275d0e0ce4dbaed01a84a55f",
    "test": "0f892ba2fcb97da20443b3ce06d6bc972adb0e41ee6d338c22fa644350b3e2f7",
}
DESCRIPTION = "COCO Captions (2014) with the splits of Karpathy and Fei-Fei; train holds restval."
HOMEPAGE = "https://cocodataset.org"
CITATION = """\
@article{chen2015microsoft,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
          Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  journal={arXiv:1504.00325},
  year={2015}
}"""

LISTING = """\
  train2014/COCO_train2014_000000000009.jpg ...   http://images.cocodataset.org/zips/train2014.zip
  val2014/COCO_val2014_000000000042.jpg ...       http://images.cocodataset.org/zips/val2014.zip
  dataset_coco.json                               from, or still in,
      https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip

or, in place of dataset_coco.json, all of
  captions_train2014.json, captions_val2014.json  from, or still in,
      http://images.cocodataset.org/annotations/annotations_trainval2014.zip
  karpathy_val_images.txt, karpathy_test_images.txt, a picture a line:
      val2014/COCO_val2014_000000391895.jpg 391895

--download fetches dataset_coco.json, --download-images the pictures."""


def coco_source(manual_dir: str | Path, images: str | Path | None = None, store_images: bool = True) -> Source:
    """COCO Captions, as the data set "coco".

    Args:
      manual_dir: a folder with the files in `LISTING`; captions are taken from dataset_coco.json if it is there.
      images: the folder that train2014/ and val2014/ lie in, if that is another one.
      store_images: whether to copy the pictures into the data set.

    Returns:
      Its image_id is COCO's number.

    Raises:
      UserError: a file is missing, or is not what its name says.
    """
    folder = Path(manual_dir)
    if file := find_file(folder, "dataset_coco.json", "caption_datasets.zip"):
        files = [file]
        rows = annotations.read_karpathy(file, "coco")
    else:
        archive = "annotations_trainval2014.zip"
        found = [find_file(folder, f"captions_{part}.json", archive) for part in ("train2014", "val2014")]
        found += [find_file(folder, f"karpathy_{split}_images.txt") for split in ("val", "test")]
        files = [file for file in found if file is not None]
        if len(files) < len(found):
            raise annotations.not_there(folder, "COCO Captions", LISTING)
        rows = _read_official(*files)
    records, problems = annotations.tidy(rows)
    notes = annotations.check_counts("COCO", records, COUNTS)
    _check_ids(records)
    where = Path(images or folder).resolve()
    for part in ("train2014", "val2014"):
        if any(record.image.startswith(part) for record in records) and not (where / part).is_dir():
            raise annotations.not_there(where, f"COCO's pictures of {part}", LISTING)
    return Source(
        name="coco",
        origin={
            "annotations": [file.digest() for file in files],
            "store_images": store_images,
        },
        found={"annotations": [file.name for file in files], "images": str(where)},
        root=str(where),
        parts=picture_parts(records, where, store_images=store_images),
        has_images=store_images,
        problems=problems,
        notes=notes,
        description=DESCRIPTION,
        homepage=HOMEPAGE,
        citation=CITATION,
    )


def _read_official(train: OwnersFile, val: OwnersFile, *lists: OwnersFile) -> list[Record | Problem]:
    """COCO's own captions, with the splits of two lists: val's and test's."""
    splits: dict[str, str] = {}
    listed: dict[str, str] = {}  # where each id is listed
    for split, file in zip(("val", "test"), lists, strict=True):
        for where, line in file.lines():
            if not (number := re.search(r"(\d+)(\.jpg)?\s*$", line)):
                raise UserError(f"{where}: {line!r} does not end with the number of a picture of COCO's.")
            image_id = str(int(number[1]))
            if image_id in splits:
                raise UserError(f"{where}: picture {image_id} is listed in {listed[image_id]} already.")
            splits[image_id], listed[image_id] = split, where
    rows: list[Record | Problem] = []
    known: set[str] = set()
    for part, file in (("train2014", train), ("val2014", val)):
        content = file.json()
        images, captions = (file.objects(content, key) for key in ("images", "annotations"))
        by_id, problems = annotations.join_captions(file, images, captions)
        rows += problems
        known.update(by_id)
        for index, image in enumerate(images):
            where = f"{file.name}: images[{index}]"
            name, image_id = str(image.get("file_name")), str(image.get("id"))
            if not name.startswith(f"COCO_{part}_"):
                raise UserError(f"{where}: {name!r} is not one of the pictures COCO_{part}_*. Is it another file?")
            rows.append(Record(where, f"{part}/{name}", image_id, by_id[image_id], splits.get(image_id, "train")))
    unknown = splits.keys() - known
    rows += [Problem(listed[image_id], "listed image unknown", image_id) for image_id in sorted(unknown)]
    return rows


def _check_ids(records: list[Record]) -> None:
    for split, digest in _IDS.items():
        ids = sorted(int(record.image_id) for record in records if record.split == split)
        if len(ids) == COUNTS[split] and hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest() != digest:
            raise UserError(f"COCO's {split} split does not hold the pictures of Karpathy's. Are the lists exchanged?")
