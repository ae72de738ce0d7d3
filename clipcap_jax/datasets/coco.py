"""COCO Captions with the splits of Karpathy and Fei-Fei (CVPR 2015), on which the field compares captioners.

train (Karpathy's "train" and "restval") 113,287 pictures, val 5,000, test 5,000, with five captions or a few more each.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path

from clipcap_jax.datasets.readers import TextFile, find_file, join_captions, make_record, not_there, read_karpathy
from clipcap_jax.datasets.source import Problem, Record, Source
from clipcap_jax.datasets.tidy import check_counts, find_pictures, published, tidy
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

The pictures may also lie in train2017/ and val2017/ (000000000009.jpg ...), or all in one folder.

Or, in place of dataset_coco.json, all of
  captions_train2014.json, captions_val2014.json  from, or still in,
      http://images.cocodataset.org/annotations/annotations_trainval2014.zip (or those of 2017)
  karpathy_val_images.txt, karpathy_test_images.txt, a picture a line:
      val2014/COCO_val2014_000000391895.jpg 391895

--download fetches dataset_coco.json, --download-images the pictures."""


def coco_source(manual_dir: str | Path) -> Source:
    """COCO Captions, as the data set "coco".

    Args:
      manual_dir: a folder with the files in `LISTING`; captions are taken from dataset_coco.json if it is there.

    Returns:
      Its image_id is COCO's number.

    Raises:
      UserError: a file is missing, or is not what its name says.
    """
    folder = Path(manual_dir).resolve()
    if file := find_file(folder, "dataset_coco.json", "caption_datasets.zip"):
        files = [file]
        rows = read_karpathy(file, "coco")
    else:
        files, parts = _official_files(folder)
        rows = _read_official(parts, *files)
    rows = [_numbered(row) for row in rows]
    wanted = _places(rows)
    rows, found = find_pictures(rows, folder)
    for place, count in (wanted & _places(rows)).items():
        if count == wanted[place] and not (folder / place).is_dir():
            raise not_there(folder, f"COCO's pictures of {place}", LISTING)
    records, problems, notes = tidy(rows, splits=COUNTS)
    notes += check_counts("COCO", records, COUNTS)
    _check_ids(records)
    return published(
        "coco",
        files,
        folder,
        records,
        problems,
        [*found, *notes],
        description=DESCRIPTION,
        homepage=HOMEPAGE,
        citation=CITATION,
    )


def _official_files(folder: Path) -> tuple[list[TextFile], tuple[str, str]]:
    """COCO's captions of train and val with Karpathy's lists of val and test, and the two folders of the former."""
    lists = [find_file(folder, f"karpathy_{split}_images.txt") for split in ("val", "test")]
    for year in ("2014", "2017"):
        parts = (f"train{year}", f"val{year}")
        archive = f"annotations_trainval{year}.zip"
        found = [find_file(folder, f"captions_{part}.json", archive) for part in parts] + lists
        files = [file for file in found if file is not None]
        if len(files) == len(found):
            return files, parts
    raise not_there(folder, "COCO Captions", LISTING)


def _read_official(parts: tuple[str, str], train: TextFile, val: TextFile, *lists: TextFile) -> list[Record | Problem]:
    """COCO's own captions, with the splits of two lists: val's and test's."""
    splits: dict[str, str] = {}
    listed: dict[str, str] = {}  # where each id is listed
    for split, file in zip(("val", "test"), lists, strict=True):
        for where, line in file.lines():
            if not (number := re.search(r"([0-9]{1,18})(\.jpg)?\s*$", line)):
                raise UserError(f"{where}: {line!r} does not end with the number of a picture of COCO's.")
            image_id = str(int(number[1]))
            if image_id in splits:
                raise UserError(f"{where}: picture {image_id} is listed in {listed[image_id]} already.")
            splits[image_id], listed[image_id] = split, where
    rows: list[Record | Problem] = []
    known: set[str] = set()
    for part, file in zip(parts, (train, val), strict=True):
        images, problems = join_captions(file, file.json())
        rows += problems
        for where, image, captions in images:
            name, image_id = str(image.get("file_name")), str(image.get("id"))
            if not re.match(r"\d{12}\.jpg$" if "2017" in part else f"COCO_{part}_", name):
                raise UserError(f"{where}: {name!r} is not one of the pictures COCO_{part}_*. Is it another file?")
            known.add(image_id)
            fields = {"image": f"{part}/{name}", "image_id": image.get("id"), "captions": captions}
            rows.append(make_record(where, fields | {"split": splits.get(image_id, "train")}))
    rows += [Problem(listed[number], "listed image unknown", number) for number in sorted(splits.keys() - known)]
    return rows


def _places(rows: list[Record | Problem]) -> Counter[str]:
    """How many pictures are looked up in which folder."""
    return Counter(row.image.partition("/")[0] for row in rows if isinstance(row, Record) and "/" in row.image)


def _numbered(row: Record | Problem) -> Record | Problem:
    """The row, or the problem that its id is no number."""
    if isinstance(row, Problem) or re.fullmatch("[0-9]{1,18}", row.image_id):
        return row
    reason = "wrong id" if row.image_id else "missing field"
    return Problem(row.where, reason, f"the number of a picture of COCO's, not {row.image_id!r}")


def _check_ids(records: list[Record]) -> None:
    for split, digest in _IDS.items():
        ids = sorted(int(record.image_id) for record in records if record.split == split)
        if len(ids) == COUNTS[split] and hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest() != digest:
            raise UserError(f"COCO's {split} split does not hold the pictures of Karpathy's. Are the lists exchanged?")
