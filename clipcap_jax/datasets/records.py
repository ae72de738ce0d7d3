"""`records`: anyone's own pictures or embeddings with a captions file, and no code.

    source = RecordsSource(name="mine", captions="captions.jsonl", images="photos")
    rich.print(prepare_records(source, data_dir))

prepares the data set `records/mine`. `clipcap_jax.datasets.captions_file` says what a captions file looks like.
What is wrong is skipped and named with file and line, and too much of it is an error.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcap_jax.datasets import prepare
from clipcap_jax.datasets.captions_file import CaptionsFile, read_captions
from clipcap_jax.datasets.source import Problem, Record, Source, first_problems, open_embeddings, picture_parts
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.errors import UserError

SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}


@dataclasses.dataclass(frozen=True)
class RecordsSource:
    """What a `records` data set is made of: a captions file, and an image folder, a matrix of embeddings, or both.

    Attributes:
      name: the data set will be "records/<name>".
      captions: a file as `clipcap_jax.datasets.captions_file` describes.
      images: the folder in which the captions file's `image` is looked up.
      embeddings: a `.npy` file, float, shape (rows, E), one row a picture; stored as float16. The captions file's
        `embedding_row` says which, or else they come in the order in which that file first names the pictures.
      encoder: what made the embeddings, such as "ViT-B/32"; stored with them so that they are not taken for others.
      store_images: whether to copy the image files into the data set, as training from pixels needs. By default only
        where there are no embeddings. Their paths are stored in any case, so that pages can show the pictures.
      split: of pictures whose record names none: one split for all, or a share for each. Shares are drawn by a hash of
        the image_id, so that a picture stays in its split when others are added.
    """

    name: str
    captions: str
    images: str | None = None
    embeddings: str | None = None
    encoder: str | None = None
    store_images: bool | None = None
    split: str | Mapping[str, float] = dataclasses.field(default_factory=SHARES.copy)


def prepare_records(
    source: RecordsSource,
    data_dir: str,
    max_skipped: float = 0.01,
    *,
    processes: int = 1,
    beam: Sequence[str] | None = None,
) -> Summary:
    """Check everything and write "records/<name>" into `data_dir`, unless it is there already.

    Args:
      source: what to prepare.
      data_dir: the folder of prepared data sets.
      max_skipped: how many problems to put up with, as a share of the records.
      processes, beam: see `prepare.prepare`.

    Returns:
      What was kept and what was skipped.

    Raises:
      UserError: a file is missing or not what it should be, there are more problems than `max_skipped` allows, or a
        data set of this name was prepared from something else.
    """
    _check_source(source)
    matrix = None if source.embeddings is None else open_embeddings(source.embeddings)
    origin = _origin(source)
    folder = None if source.images is None else Path(source.images).resolve()
    places = {"captions": source.captions, "images": folder and str(folder), "embeddings": source.embeddings}
    if done := prepare.find_prepared(f"records/{source.name}", data_dir, origin, places):
        return done

    file = read_captions(Path(source.captions))
    if not file.records and not file.problems:
        raise UserError(f"{source.captions} holds no captions.")
    notes = _assign_splits(file.records, source.split)
    if file.unused_fields:
        notes.append(f"fields of {source.captions} that were not used: {', '.join(file.unused_fields)}")
    if odd := sorted({record.split for record in file.records} - {"train", "val", "test"}):
        notes.append(f"splits that are none of train, val and test: {', '.join(odd)}")
    kept, problems = [record for record in file.records if record.captions], file.problems
    checks = [_check_files_differ]
    if matrix is not None:
        notes += _assign_rows(file, len(matrix), source)
        checks.append(lambda records: _check_rows(records, len(matrix)))
    for check in checks:
        found = check(kept)  # by image_id
        kept = [record for record in kept if record.image_id not in found]
        problems = problems + list(found.values())
    return prepare.prepare(
        Source(
            name=f"records/{source.name}",
            origin=origin,
            found=places,
            root=str(folder or ""),
            parts=picture_parts(kept, folder, store_images=_stores_images(source), embeddings=source.embeddings),
            has_images=_stores_images(source),
            embedding_width=None if matrix is None else matrix.shape[1],
            encoder=source.encoder,
            problems=problems,
            records=len(file.records) + len(file.problems),
            notes=notes,
            description="Pictures or embeddings with captions of the user's own.",
        ),
        data_dir,
        max_skipped=max_skipped,
        processes=processes,
        beam=beam,
    )


def _stores_images(source: RecordsSource) -> bool:
    return source.embeddings is None if source.store_images is None else source.store_images


def _check_source(source: RecordsSource) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source.name):
        raise UserError(f"The name {source.name!r} must be made of letters, digits, '_', '.' and '-'.")
    if source.images is None and source.embeddings is None:
        raise UserError("A records data set needs images, embeddings or both.")
    if source.images is not None and not Path(source.images).is_dir():
        raise UserError(f"The image folder {source.images} {_not_there(source.images)}.")
    if source.images is None and source.store_images:
        raise UserError("store_images needs the folder that the images lie in: set images.")
    if source.encoder is not None and source.embeddings is None:
        raise UserError("encoder names what made the embeddings, but there are none: set embeddings.")
    shares = {source.split: 1.0} if isinstance(source.split, str) else source.split
    if abs(sum(shares.values()) - 1) > 1e-6 or any(share < 0 for share in shares.values()):
        raise UserError(f"The shares of the splits must be at least 0 and add up to 1: {dict(shares)}.")
    for split in shares:
        if not re.fullmatch(r"[A-Za-z]\w*", split):
            raise UserError(f"A split's name must be a word such as train, val or test, not {split!r}.")


def _origin(source: RecordsSource) -> dict[str, Any]:
    """What tells this data set from another of the same name, wherever it lies."""

    def digest(path: str) -> str:
        with open(path, "rb") as file:
            return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    if not Path(source.captions).is_file():
        raise UserError(f"The captions file {source.captions} {_not_there(source.captions)}.")
    return {
        "captions": digest(source.captions),
        "images": source.images is not None,
        "embeddings": None if source.embeddings is None else digest(source.embeddings),
        "encoder": source.encoder,
        "store_images": _stores_images(source),
        "split": source.split if isinstance(source.split, str) else dict(source.split),
    }


def _not_there(path: str) -> str:
    return "is a folder" if Path(path).is_dir() else "is no folder" if Path(path).exists() else "does not exist"


def _assign_splits(records: Sequence[Record], split: str | Mapping[str, float]) -> list[str]:
    """Gives a split to the records that have none; returns a note where there were any."""
    shares = {split: 1.0} if isinstance(split, str) else split
    without = [record for record in records if not record.split]
    for record in without:
        draw = int.from_bytes(hashlib.sha256(record.image_id.encode()).digest()[:8]) / 2**64  # uniform in [0, 1)
        for name, share in shares.items():
            record.split = name
            draw -= share
            if draw < 0:
                break
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return [f"{len(without):,} pictures had no split and were given one: {shown}"] if without else []


def _assign_rows(file: CaptionsFile, rows: int, source: RecordsSource) -> list[str]:
    """Gives every record its row of the matrix where the file names none; returns a note on rows that nothing uses."""
    if all(record.embedding_row is None for record in file.records):
        if not file.in_order:
            raise UserError(
                f"{source.captions} names no embedding_row, and has lines that cannot be used, so pictures and rows do "
                f"not match by their order. Mend these lines or add embedding_row:\n{first_problems(file.problems)}"
            )
        if len(file.records) != rows:
            raise UserError(
                f"{source.captions} names {len(file.records):,} pictures, but {source.embeddings} has {rows:,} rows. "
                "Give each record its embedding_row."
            )
        for row, record in enumerate(file.records):
            record.embedding_row = row
    unused = rows - len({record.embedding_row for record in file.records})
    return [f"rows of {source.embeddings} that no picture uses: {unused:,}"] if unused > 0 else []


def _check_files_differ(records: list[Record]) -> dict[str, Problem]:
    """One picture under two ids would be counted twice, or be both trained on and tested on."""
    found: dict[str, Problem] = {}
    by_file: dict[str, Record] = {}
    for record in records:
        first = by_file.setdefault(os.path.normpath(record.image), record)
        if first is not record:
            reason = "image under two ids" if record.split == first.split else "image in two splits"
            detail = f"{record.image} in {record.split} is in {first.split} as {first.image_id} in {first.where}"
            found[record.image_id] = Problem(record.where, reason, detail)
    return found


def _check_rows(records: list[Record], rows: int) -> dict[str, Problem]:
    found: dict[str, Problem] = {}
    by_row: dict[int, Record] = {}
    for record in records:
        row = record.embedding_row
        if row is None:
            detail = f"{record.image_id} names none, though others do"
            found[record.image_id] = Problem(record.where, "no embedding_row", detail)
        elif not 0 <= row < rows:
            detail = f"row {row} of {rows}"
            found[record.image_id] = Problem(record.where, "embedding_row out of range", detail)
        elif (first := by_row.setdefault(row, record)) is not record:
            detail = f"row {row} belongs to {first.image_id} in {first.where}"
            found[record.image_id] = Problem(record.where, "embedding_row used twice", detail)
    return found
