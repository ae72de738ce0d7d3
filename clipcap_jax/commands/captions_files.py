"""Captions and references to score: COCO's files, those of `clipcap caption`, and tables of people's own."""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from clipcap_jax.errors import UserError, counted, first
from clipcap_jax.metrics import coco_files
from clipcap_jax.metrics.coco_files import CaptionsFile

if TYPE_CHECKING:
    from clipcap_jax.datasets.source import Record

_TABLES = (".jsonl", ".csv", ".tsv", ".txt")  # the others are JSON


def read_results(path: Path) -> tuple[dict[str, str], int]:
    """The captions to score, by image id or by what the file calls the image; and how many images have none there.

    Raises:
      UserError: the file is in none of the formats, or an image occurs twice.
    """
    if path.suffix.lower() not in _TABLES:
        return coco_files.read_results(path), 0
    records, without = _records(path)
    captions = [(_id(record), text) for record in records for text in record.captions]
    if repeated := [image for image, count in Counter(image for image, _ in captions).items() if count > 1]:
        raise UserError(f"{path}: {counted(len(repeated), 'image')} with more than one caption: {first(repeated)}")
    if not captions:
        raise UserError(f"{path} holds no captions")
    return dict(captions), without


def read_references(path: Path) -> CaptionsFile:
    """The references, by image id, or by what the file calls the image.

    Raises:
      UserError: the file is in none of the formats.
    """
    if path.suffix.lower() not in _TABLES:
        return coco_files.read_captions(path)
    file = CaptionsFile(set(), {}, {}, {})
    for record in _records(path)[0]:
        image = _id(record)
        file.images.add(image)
        file.captions.setdefault(image, []).extend(record.captions)
        file.file_names[image] = record.image
        if record.domain:
            file.domains[image] = record.domain
    return file


def matched(captions: dict[str, str], file: CaptionsFile, path: Path) -> dict[str, str]:
    """The captions by the references' ids; where they are by paths, these are matched from their ends.

    So "photos/val/12.jpg" is the image "val/12.jpg" of the references, or else "12.jpg", or else "12"; "12" may be any
    of these. What matches none keeps its name.

    Raises:
      UserError: two captions are of one image.
    """
    if captions.keys() <= file.images:
        return captions
    exact = {name: image for image, name in file.file_names.items()} | {image: image for image in file.images}
    names: dict[str, str] = {}
    for part in (lambda path: path.stem, lambda path: path.name):
        ends = [(part(PurePosixPath(name)), image) for name, image in exact.items()]
        several = Counter(end for end, _ in set(ends))
        names |= {end: image for end, image in ends if several[end] == 1}
    names |= exact
    ids = [_match(image, names) for image in captions]
    if twice := [image for image, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{path}: {counted(len(twice), 'image')} with captions of several files: {first(twice)}")
    return dict(zip(ids, captions.values(), strict=True))


def _match(image: str, names: dict[str, str]) -> str:
    path = PurePosixPath(image)
    ends = ["/".join(path.parts[start:]) for start in range(len(path.parts))]
    number = next(iter(coco_files.by_number({image: ""})))
    return next((names[end] for end in (image, *ends, path.stem, number) if end in names), image)


def _id(record: "Record") -> str:
    return record.image_id or record.image


def _records(path: Path) -> tuple[list["Record"], int]:
    """The rows of a table, and how many say why they have no caption."""
    from clipcap_jax.datasets import readers, source

    rows, _ = readers.read_captions(path)
    problems = [row for row in rows if isinstance(row, source.Problem)]
    without = [problem for problem in problems if problem.reason == readers.NO_CAPTION]
    if len(problems) > len(without):
        problems = [problem for problem in problems if problem.reason != readers.NO_CAPTION]
        told = source.first_problems(problems)
        raise UserError(f"{path}: {counted(len(problems), 'line')} cannot be read:\n{told}")
    return [row for row in rows if not isinstance(row, source.Problem)], len(without)
