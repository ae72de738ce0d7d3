"""nocaps (Agrawal et al., ICCV 2019): Open Images with objects that COCO's captions do not name.

val has 4,500 pictures with ten captions each, and a domain by which scores are told apart: "in-domain", "near-domain"
or "out-domain". test has 10,600 pictures; its captions are on the evaluation server only.
"""

import os
from pathlib import Path

from clipcap_jax.datasets.readers import TextFile, find_file, join_captions, make_record, not_there
from clipcap_jax.datasets.source import Problem, Record, Source
from clipcap_jax.datasets.tidy import check_counts, find_pictures, published, tidy
from clipcap_jax.errors import UserError

COUNTS = {"val": 4500, "test": 10_600}
DOMAINS = ("in-domain", "near-domain", "out-domain")
FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
_FOLDERS = {"val": ("val", "validation", "images"), "test": ("test", "images")}

LISTING = """\
  nocaps_val_4500_captions.json      "Validation Set Captions" of https://nocaps.org/download
  val/0013ea2087020901.jpg ...       (or validation/ or images/) the pictures
  nocaps_test_image_info.json        "Test Set Image Info" there } where test
  test/0000d67245642c5f.jpg ...      (or images/) its pictures   } is wanted

The two .json files name the pictures' addresses; --download-images fetches them."""


def nocaps_source(manual_dir: str | Path) -> Source:
    """nocaps, as the data set "nocaps"; test only where its file is there.

    Args:
      manual_dir: a folder with the files in `LISTING`.

    Returns:
      Its image_id is the number that the evaluation server asks for, its domain the field that the val file has.

    Raises:
      UserError: a file is missing, or is not what its name says.
    """
    folder = Path(manual_dir).resolve()
    files = {split: file for split, name in FILES.items() if (file := find_file(folder, name))}
    if not files:
        raise not_there(folder, "nocaps", LISTING)
    records, problems, notes = [], [], []
    for split, file in files.items():  # each by itself, as ids of val and test are numbers from 0
        where = picture_folder(folder, split)
        if where is None:
            raise not_there(folder, f"the pictures of nocaps {split}", LISTING)
        rows, more = find_pictures(_read(file, split, where), folder)
        notes += more
        tidied, found, more = tidy(rows, captioned=split == "val")
        notes += more + check_counts("nocaps", tidied, {split: COUNTS[split]})
        records += tidied
        problems += found
    return published(
        "nocaps",
        [*files.values()],
        folder,
        records,
        problems,
        notes,
        description="nocaps: novel object captioning at scale.",
        homepage="https://nocaps.org",
        citation="""\
@inproceedings{agrawal2019nocaps,
  title={nocaps: novel object captioning at scale},
  author={Agrawal, Harsh and Desai, Karan and Wang, Yufei and Chen, Xinlei and Jain, Rishabh and Johnson, Mark and
          Batra, Dhruv and Parikh, Devi and Lee, Stefan and Anderson, Peter},
  booktitle={ICCV},
  year={2019}
}""",
    )


def picture_folder(place: Path, split: str) -> Path | None:
    """The folder with the pictures of a split, if there is one."""
    return next((place / name for name in _FOLDERS[split] if (place / name).is_dir()), None)


def _read(file: TextFile, split: str, where: Path) -> list[Record | Problem]:
    """COCO's format with `open_images_id` and, in val, `domain` and `annotations`; see https://nocaps.org/download."""
    content = file.json()
    has_captions = "annotations" in content
    if has_captions != (split == "val"):
        raise UserError(
            f"{file} {'has' if has_captions else 'lacks'} the list 'annotations': val has captions, test has none. "
            "Are the files exchanged?"
        )
    images, problems = join_captions(file, {"annotations": [], **content})
    rows: list[Record | Problem] = [*problems]
    for location, image, captions in images:
        name, other, domain = image.get("file_name"), image.get("open_images_id"), image.get("domain", "")
        if split == "val" and domain not in DOMAINS:
            rows.append(Problem(location, "wrong domain", f"{domain!r} is none of {', '.join(DOMAINS)}"))
            continue
        if isinstance(other, str) and not (isinstance(name, str) and os.path.isfile(where / name)):
            name = f"{other}.jpg"
        fields = {"image": f"{where.name}/{name}" if name else None, "image_id": image.get("id"), "captions": captions}
        rows.append(make_record(location, fields | {"split": split, "domain": domain}))
    return rows
