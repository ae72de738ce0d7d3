"""`records`: anyone's own pictures or embeddings with a captions file, and no code.

    source = RecordsSource(name="mine", captions="captions.jsonl", images="photos")
    rich.print(prepare_records(source, data_dir))

prepares the data set `records/mine`. `clipcap_jax.datasets.readers` says what a captions file looks like.
What is wrong is skipped and named with file and line, and too much of it is an error.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcap_jax.datasets import prepare
from clipcap_jax.datasets.readers import read_captions
from clipcap_jax.datasets.source import Problem, Record, Source, first_problems, open_embeddings, picture_parts
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.datasets.tidy import find_pictures, name_pictures, tidy, usual_split, without_suffix
from clipcap_jax.errors import UserError

SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}


@dataclasses.dataclass(frozen=True)
class RecordsSource:
    """What a `records` data set is made of: a captions file, and an image folder, a matrix of embeddings, or both.

    Attributes:
      name: the data set will be "records/<name>".
      captions: a file as `clipcap_jax.datasets.readers` describes.
      images: the folder in which the captions file's `image` is looked up.
      embeddings: a `.npy` file, float, shape (rows, E), one row a picture; stored as float16. The captions file's
        `embedding_row` says which, or else they come in the order in which that file first names the pictures.
      encoder: what made the embeddings, such as "ViT-B/32"; stored with them so that they are not taken for others.
      store_images: whether to copy the image files into the data set, as training from pixels needs. By default only
        where there are no embeddings. Their paths are stored in any case, so that pages can show the pictures.
      split: of pictures whose record names none: one split for all, or a share for each. Shares are drawn by a hash of
        the image_id, so that a picture stays in its split when others are added. Where no record names one, each that
        has a share gets a picture at least, in a small set by taking the last drawn of the largest; that does not stay.
      image_field, caption_field: what the captions file calls them, where that cannot be guessed.
    """

    name: str
    captions: str
    images: str | None = None
    embeddings: str | None = None
    encoder: str | None = None
    store_images: bool | None = None
    split: str | Mapping[str, float] = dataclasses.field(default_factory=SHARES.copy)
    image_field: str | None = None
    caption_field: str | None = None


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

    rows, notes = read_captions(Path(source.captions), source.image_field, source.caption_field)
    if not rows:
        raise UserError(f"{source.captions} holds no captions.")
    if matrix is not None:
        notes += _assign_rows(rows, len(matrix), source)
        if source.encoder is None:
            notes.append("what made the embeddings is not named (--encoder): those of any other encoder pass for them")
    if folder is not None:
        rows, more = find_pictures(rows, folder)
        notes += more
    records, problems, more = tidy(rows)
    notes += more + _assign_splits(records, source.split)
    if odd := sorted({record.split for record in records} - {"train", "val", "test"}):
        notes.append(f"splits that are none of train, val and test: {', '.join(odd)}")
    if matrix is not None:
        records, found = _check_rows(records, len(matrix))
        problems += found
    return prepare.prepare(
        Source(
            name=f"records/{source.name}",
            origin=origin,
            found=places,
            root=str(folder or ""),
            parts=picture_parts(records, folder, store_images=_stores_images(source), embeddings=source.embeddings),
            has_images=_stores_images(source),
            embedding_width=None if matrix is None else matrix.shape[1],
            encoder=source.encoder,
            problems=problems,
            records=len(records) + sum(problem.count for problem in problems),
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
        usual_split(split, "--split")


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
        "image_field": source.image_field,
        "caption_field": source.caption_field,
    }


def _not_there(path: str) -> str:
    return "is a folder" if Path(path).is_dir() else "is no folder" if Path(path).exists() else "does not exist"


def _assign_splits(records: Sequence[Record], split: str | Mapping[str, float]) -> list[str]:
    """Gives a split to the records that have none; returns a note where there were any."""
    shares: Counter[str] = Counter()
    for name, share in ({split: 1.0} if isinstance(split, str) else split).items():
        shares[usual_split(name, "--split")] += share  # type: ignore[assignment]  # not whole numbers
    without = [record for record in records if not record.split]
    for record in without:
        draw = _draw(record)
        for name, share in shares.items():
            record.split = name
            draw -= share
            if draw < 0:
                break
    if not without:
        return []
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
    notes = [f"{len(without):,} pictures had no split and were given one: {shown}"]
    if len(without) == len(records):
        notes += _fill_splits(records, [name for name, share in shares.items() if share])
    return notes


def _draw(record: Record) -> float:
    """Uniform in [0, 1); by the id without its suffix, so that a.jpg stays where it is when a.png is added."""
    digest = hashlib.sha256(without_suffix(record.image_id).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _fill_splits(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Moves a picture to each of these splits that has none; returns a note where that was needed."""
    if len(records) < len(names):
        raise UserError(
            f"{len(records)} pictures cannot be shared among {', '.join(names)}. Give more, or put all in one split: "
            "--split train"
        )
    moved = []
    for name in names:
        counts = Counter(record.split for record in records)
        if not counts[name]:
            largest = counts.most_common(1)[0][0]
            max((record for record in records if record.split == largest), key=_draw).split = name
            moved.append(name)
    return [f"splits that the shares left empty and that were given a picture: {', '.join(moved)}"] if moved else []


def _assign_rows(rows: Sequence[Record | Problem], count: int, source: RecordsSource) -> list[str]:
    """Gives every record its row of the matrix where the file names none; returns a note on rows that nothing uses."""
    name_pictures(rows)
    records = [row for row in rows if isinstance(row, Record)]
    if all(record.embedding_row is None for record in records):
        places: dict[str, int] = {}  # of pictures, in the order in which the file names them first
        faults = [row for row in rows if isinstance(row, Problem)]
        for record in records:
            if record.image_id in places and not record.joins:
                faults.append(Problem(record.where, "duplicate image_id", record.image_id))
            record.embedding_row = places.setdefault(record.image_id, len(places))
        if faults:
            raise UserError(
                f"{source.captions} names no embedding_row, and has lines that cannot be used, so pictures and rows do "
                f"not match by their order. Mend these lines or add embedding_row:\n{first_problems(faults)}"
            )
        if len(places) != count:
            raise UserError(
                f"{source.captions} names {len(places):,} pictures, but {source.embeddings} has {count:,} rows. "
                "Give each record its embedding_row."
            )
    unused = count - len({record.embedding_row for record in records})
    return [f"rows of {source.embeddings} that no picture uses: {unused:,}"] if unused > 0 else []


def _check_rows(records: Sequence[Record], count: int) -> tuple[list[Record], list[Problem]]:
    """The records whose row of the matrix is their own, and what is wrong with the others."""
    kept: dict[int, Record] = {}
    problems = []
    for record in records:
        row = record.embedding_row
        if row is None:
            detail = f"{record.image_id} names none, though others do"
            problems.append(Problem(record.where, "no embedding_row", detail))
        elif not 0 <= row < count:
            problems.append(Problem(record.where, "embedding_row out of range", f"row {row} of {count}"))
        elif (first := kept.setdefault(row, record)) is not record:
            detail = f"row {row} belongs to {first.image_id} in {first.where}"
            problems.append(Problem(record.where, "embedding_row used twice", detail))
    return list(kept.values()), problems
