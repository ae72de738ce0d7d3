"""nocaps (Agrawal et al., ICCV 2019): Open Images with objects that COCO's captions do not name.

val has 4,500 pictures with ten captions each, and a domain by which scores are told apart: "in-domain", "near-domain"
or "out-domain". test has 10,600 pictures; its captions are on the evaluation server only.
"""

import os
from pathlib import Path

from clipcap_jax.datasets import annotations
from clipcap_jax.datasets.annotations import OwnersFile, find_file
from clipcap_jax.datasets.source import Problem, Record, Source, picture_parts
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


def nocaps_source(manual_dir: str | Path, images: str | Path | None = None, store_images: bool = True) -> Source:
    """nocaps, as the data set "nocaps"; test only where its file is there.

    Args:
      manual_dir: a folder with the files in `LISTING`.
      images: the folder that val/ and test/ lie in, or all pictures, if that is another one.
      store_images: whether to copy the pictures into the data set.

    Returns:
      Its image_id is the number that the evaluation server asks for, its domain the field that the val file has.

    Raises:
      UserError: a file is missing, or is not what its name says.
    """
    folder = Path(manual_dir)
    place = Path(images or folder).resolve()
    files = {split: file for split, name in FILES.items() if (file := find_file(folder, name))}
    if not files:
        raise annotations.not_there(folder, "nocaps", LISTING)
    parts, problems, notes = [], [], []
    for split, file in files.items():
        where = picture_folder(place, split) or (place if images and place.is_dir() else None)
        if where is None:
            raise annotations.not_there(place, f"the pictures of nocaps {split}", LISTING)
        records, found = annotations.tidy(_read(file, split, where, place), captioned=split == "val")
        notes += annotations.check_counts("nocaps", records, {split: COUNTS[split]})
        problems += found
        parts += picture_parts(records, place, store_images=store_images)
    return Source(
        name="nocaps",
        origin={
            "annotations": [file.digest() for file in files.values()],
            "store_images": store_images,
        },
        found={"annotations": [file.name for file in files.values()], "images": str(place)},
        root=str(place),
        parts=parts,
        has_images=store_images,
        problems=problems,
        notes=notes,
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


def _read(file: OwnersFile, split: str, where: Path, place: Path) -> list[Record | Problem]:
    """COCO's format with `open_images_id` and, in val, `domain` and `annotations`; see https://nocaps.org/download."""
    content = file.json()
    has_captions = "annotations" in content
    if has_captions != (split == "val"):
        raise UserError(
            f"{file} {'has' if has_captions else 'lacks'} the list 'annotations': val has captions, test has none. "
            "Are the files exchanged?"
        )
    images = file.objects(content, "images")
    captions = file.objects(content, "annotations") if has_captions else []
    by_id, problems = annotations.join_captions(file, images, captions)
    rows: list[Record | Problem] = [*problems]
    for index, image in enumerate(images):
        location = f"{file.name}: images[{index}]"
        image_id, domain = str(image.get("id")), image.get("domain", "")
        if split == "val" and domain not in DOMAINS:
            rows.append(Problem(location, "wrong domain", f"{domain!r} is none of {', '.join(DOMAINS)}"))
            continue
        name = image.get("file_name") or ""
        if isinstance(image.get("open_images_id"), str) and not os.path.isfile(where / str(name)):
            name = f"{image['open_images_id']}.jpg"
        path = os.path.relpath(where / name, place) if isinstance(name, str) and name else name
        rows.append(Record(location, path, image_id, by_id[image_id], split, domain=domain))
    return rows
