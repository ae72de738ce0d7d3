"""Results for the evaluation servers of COCO and nocaps, which take nothing that is not complete.

COCO's (https://cocodataset.org/#captions-upload) takes a zip of two results files, of val2014 and test2014; nocaps'
(https://nocaps.org) one results file of val or test.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from clipcap_jax.errors import UserError, first
from clipcap_jax.files import to_json, whole
from clipcap_jax.metrics import coco_files

COUNTS = {"val2014": 40_504, "test2014": 40_775, "nocaps val": 4_500, "nocaps test": 10_600}


def checked(split: str, captions: Path, images: Path) -> list[dict[str, str | int]]:
    """The entries of a results file, in the order of the pictures' own file.

    Args:
      split: a key of `COUNTS`.
      captions: a results file.
      images: the owner's file that lists the pictures, with or without captions.

    Raises:
      UserError: a file is not what it should be; a caption is missing, empty or of a picture that is not listed.
    """
    texts, listed = coco_files.read_results(captions), coco_files.read_images(images)
    problems, known = [], set(listed)
    if len(known) < len(listed):
        problems.append(f"{images} lists {len(listed) - len(known):,} pictures twice")
    if len(listed) != COUNTS[split]:
        problems.append(f"{images} lists {len(listed):,} pictures, and {split} has {COUNTS[split]:,}")
    if missing := [image for image in listed if image not in texts]:
        problems.append(f"{len(missing):,} pictures have no caption: {first(missing)}")
    if extra := [image for image in texts if image not in known]:
        problems.append(f"{len(extra):,} captions are of pictures that are not listed: {first(extra)}")
    if blank := [image for image, text in texts.items() if not text.strip()]:
        problems.append(f"{len(blank):,} captions are empty: {first(blank)}")
    if odd := [image for image in texts if not isinstance(coco_files.coco_id(image), int)]:
        problems.append(f"{len(odd):,} image ids are no numbers: {first(odd)}")
    if problems:
        raise UserError(f"{captions} is no submission for {split}:\n  " + "\n  ".join(problems))
    return [{"image_id": coco_files.coco_id(image), "caption": texts[image]} for image in listed]


def write_coco(path: Path, name: str, results: Mapping[str, list[dict[str, str | int]]]) -> None:
    """Writes the zip for COCO's server: split -> what `checked` gave; `name` is the method's."""
    with whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, entries in results.items():
            archive.writestr(f"captions_{split}_{name}_results.json", to_json(entries))


def write_nocaps(path: Path, entries: list[dict[str, str | int]]) -> None:
    """Writes the file for nocaps' server."""
    with whole(path) as partial:
        partial.write_text(to_json(entries), encoding="utf-8")
