"""Conceptual Captions: 3.3 million (CC3M, Sharma et al. 2018) and 12 million (CC12M, Changpinyo et al. 2021) links.

They are lists of links, many of which are dead by now, so everyone's pictures are others. Read is what downloads leave:

  - img2dataset's `webdataset`: 00000.tar with 000000012.jpg, .txt and .json, and 00000_stats.json beside it;
    (or, as they lie on the Hugging Face hub, cc3m-train-0000.tar and cc3m-validation-00.tar in one folder);
  - img2dataset's `files`: folders 00000/ with the same, and 00000_stats.json beside them;
  - the owners' list with a folder of pictures named after the row, counted from 0, in eight digits: 00000012.jpg. This
    is how parse_conceptual.py of the original ClipCap names them.

Whatever the format, a caption and its picture are joined by their name, never by their order.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipcap_jax.datasets import img2dataset
from clipcap_jax.datasets.img2dataset import Sample
from clipcap_jax.datasets.readers import not_there
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import PICTURES_PER_SHARD, Part, Problem, Source, broken_picture, read_file
from clipcap_jax.datasets.tidy import clean_captions
from clipcap_jax.errors import UserError

_DEAD = ("dead link", "link to no picture")
# What is no fault of anyone's files. Servers' "not found" pictures make many a picture occur in both splits.
EXPECTED = (*_DEAD, "image in two splits")
_LISTS = {
    "cc3m": {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"},
    "cc12m": {"train": "cc12m.tsv"},
}
_URL_COLUMN = {"cc3m": 1, "cc12m": 0}  # the other one is the caption
_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}

LISTINGS = {
    "cc3m": """\
  train/00000.tar, 00000_stats.json ...    img2dataset's output for Train_GCC-training.tsv, as webdataset or files
  val/00000.tar, 00000_stats.json ...      the same for Validation_GCC-1.1.0-Validation.tsv

or
  Train_GCC-training.tsv                   both from https://ai.google.com/research/ConceptualCaptions/download
  Validation_GCC-1.1.0-Validation.tsv
  train/00000000.jpg ...                   the picture of each row, counted from 0
  val/00000000.jpg ...""",
    "cc12m": """\
  train/00000.tar, 00000_stats.json ...    img2dataset's output for cc12m.tsv, as webdataset or files

or
  cc12m.tsv                                from https://github.com/google-research-datasets/conceptual-12m
  train/00000000.jpg ...                   the picture of each row, counted from 0""",
}
_CITATIONS = {
    "cc3m": """\
@inproceedings{sharma2018conceptual,
  title={Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset For Automatic Image Captioning},
  author={Sharma, Piyush and Ding, Nan and Goodman, Sebastian and Soricut, Radu},
  booktitle={ACL},
  year={2018}
}""",
    "cc12m": """\
@inproceedings{changpinyo2021cc12m,
  title={{Conceptual 12M}: Pushing Web-Scale Image-Text Pre-Training To Recognize Long-Tail Visual Concepts},
  author={Changpinyo, Soravit and Sharma, Piyush and Ding, Nan and Soricut, Radu},
  booktitle={CVPR},
  year={2021}
}""",
}


def conceptual_source(name: str, manual_dir: str | Path) -> Source:
    """CC3M or CC12M, as the data set of that name, read piece by piece while it is prepared.

    A picture of train whose link or whose bytes are among validation's is left out of train.

    Args:
      name: "cc3m" or "cc12m".
      manual_dir: a folder with the files in `LISTINGS`.

    Returns:
      Its image_id is img2dataset's key, or the row in eight digits.

    Raises:
      UserError: there is no such file, or a list is another's.
    """
    folder = Path(manual_dir).resolve()
    val = _pieces(name, folder, "val")
    train = _pieces(name, folder, "train", held_out=tuple(val))
    pieces = train + val
    if not train:
        raise not_there(folder, f"training data of {name}", LISTINGS[name])
    problems, notes = _read_stats(pieces)
    if name == "cc3m" and not val:
        notes.append(f"no validation data: none of {', '.join(_FOLDERS['val'])} in {folder}")
    if val and _size(val) > _size(train) > 0:
        raise UserError(f"{folder} holds more for validation than for training. Are the two exchanged?")
    return Source(
        name=name,
        origin={"files": _described(pieces, folder)},
        found={"images": str(folder)},
        root=str(folder),
        parts=[Part(piece.split, functools.partial(read_piece, piece, folder)) for piece in pieces],
        has_images=True,
        problems=problems,
        expected=EXPECTED,
        notes=notes,
        description=f"Conceptual Captions {name.removeprefix('cc').upper()}: what was left of its links.",
        homepage="https://ai.google.com/research/ConceptualCaptions",
        citation=_CITATIONS[name],
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """A stretch of the owners' list.

    Attributes:
      offset: of its first line, in bytes.
      line: number of its first line in the file, from 1.
      first: number of its first row, from 0.
      count: of its rows.
      url_column: 0 or 1.
      pictures: the folder that the pictures lie in.
    """

    offset: int
    line: int
    first: int
    count: int
    url_column: int
    pictures: Path


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a part is made of: a tar or a folder of img2dataset's, or a stretch of the owners' list.

    Attributes:
      split: "train" or "val".
      path: of the tar, the folder or the list.
      held_out: shards whose links and pictures this one must not have.
      rows: which part of the list; None where there is none.
    """

    split: str
    path: Path
    held_out: tuple["Piece", ...] = ()
    rows: Rows | None = None


def read_piece(piece: Piece, folder: Path) -> Iterator[Example | Problem]:
    """Its examples; their paths start from `folder`."""
    keys = set()
    marks = _marks(piece.held_out)
    dead: list[str] = []
    for sample in _samples(piece):
        if isinstance(sample, Problem):
            yield sample
            continue
        if sample.image is None and sample.missing in _DEAD and not sample.fault:
            dead.append(sample.where)
            continue
        problem = _fault(sample) or _seen(sample, marks)
        if problem is None and sample.key in keys:
            problem = Problem(sample.where, "duplicate image_id", sample.key)
        if problem is not None:
            yield problem
            continue
        texts = [] if sample.caption is None else [sample.caption]
        captions, problems = clean_captions(texts, sample.where, sample.key)
        yield from problems
        if not captions:
            continue
        keys.add(sample.key)
        yield Example(
            image=sample.image,
            embedding=None,
            image_path=os.path.relpath(sample.image_path, folder) if sample.image_path else "",
            image_id=sample.key,
            captions=tuple(captions),
            domain="",
        )
    if dead:  # of a third of the list; one by one, they would take more memory than all else
        yield Problem(dead[0], _DEAD[0], f"no picture for {len(dead):,} rows, the last {dead[-1]}", len(dead))


def _fault(sample: Sample) -> Problem | None:
    if not sample.key.isprintable():  # in a tar, a name may be any bytes
        return Problem(sample.where, "broken text", repr(sample.key))
    if sample.fault:
        return Problem(sample.where, "download failed", sample.fault)
    if sample.image is None:
        return Problem(sample.where, sample.missing, sample.image_path or sample.key)
    return broken_picture(sample.image, sample.where, sample.image_path or sample.key)


def _seen(sample: Sample, marks: frozenset[bytes]) -> Problem | None:
    for what, mark in (("link", _mark(sample.url.encode())), ("picture", _mark(sample.image or b""))):
        if mark in marks:
            return Problem(sample.where, "image in two splits", f"its {what} is in val: {sample.url or sample.key}")
    return None


@functools.lru_cache(maxsize=1)  # each process reads validation once, some 15,000 pictures
def _marks(shards: tuple[Piece, ...]) -> frozenset[bytes]:
    marks = set()
    for shard in shards:
        for sample in _samples(shard):
            if isinstance(sample, Sample):
                marks |= {_mark(sample.url.encode()), _mark(sample.image or b"")}
    return frozenset(marks - {_mark(b"")})


def _mark(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _pieces(name: str, folder: Path, split: str, held_out: tuple[Piece, ...] = ()) -> list[Piece]:
    candidates = [folder / candidate for candidate in _FOLDERS[split]]
    place = next((candidate for candidate in candidates if candidate.is_dir()), folder)
    listed = folder / _LISTS[name].get(split, "none")
    paths = []
    has_pictures = False
    with os.scandir(place) as entries:  # of which there may be millions
        for entry in entries:
            has_pictures |= entry.name.endswith(".jpg")
            # In a folder for both splits, the name of a shard says which it is of.
            pattern = r"\d+" if entry.is_dir() else r"(.*[-_])?\d+\.tar"
            if re.fullmatch(pattern, entry.name) and (place != folder or _split_of(name, entry.path) == split):
                paths.append(Path(entry.path))
    if len({path.stem for path in paths}) < len(paths):
        raise UserError(f"{place} holds shards both as .tar and as folders. Leave one of them there.")
    if paths:
        return [Piece(split, path, held_out) for path in sorted(paths)]
    if not listed.is_file():
        return []
    if place == folder and split == "val":
        raise not_there(folder, f"the pictures of {listed.name}", LISTINGS[name])
    if not has_pictures:
        raise not_there(place, "pictures such as 00000000.jpg", LISTINGS[name])
    return [Piece(split, listed, held_out, rows) for rows in _index_list(listed, _URL_COLUMN[name], place)]


def _split_of(name: str, path: str) -> str:
    """The split that the name of a shard says; CC12M has but one, and its shards' names need not say it."""
    words = set(re.findall(r"[a-z]+", os.path.basename(path).removesuffix(".tar")))
    for split, spellings in _FOLDERS.items():
        if words & set(spellings):
            return split
    if name == "cc12m" and not words & {"test", "dev", "valid"}:
        return "train"
    raise UserError(f"{path}: is it of train or of validation? Put it into a folder of that name.")


def _samples(piece: Piece) -> Iterator[Sample | Problem]:
    if piece.rows is not None:
        return _read_rows(piece.path, piece.rows)
    return img2dataset.read(piece.path)


def _index_list(path: Path, url_column: int, pictures: Path) -> Iterator[Rows]:
    """Stretches of `PICTURES_PER_SHARD` rows. A header, which img2dataset wants, is no row.

    Raises:
      UserError: the columns come in another order.
    """
    offset = first = count = 0
    start = 0, 1  # offset and line
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            columns = _split_line(data) or ["", ""]
            if line == 1 and sorted(columns) == ["caption", "url"]:
                url_column = columns.index("url")
                offset = len(data)
                start = offset, 2
                continue
            if line == 1 and columns[1 - url_column].startswith("http"):
                raise UserError(f"{path}:1: a link where the caption should be. Is it the list of another data set?")
            offset += len(data)
            count += 1
            if count == PICTURES_PER_SHARD:
                yield Rows(*start, first, count, url_column, pictures)
                first, count, start = first + count, 0, (offset, line + 1)
    if count:
        yield Rows(*start, first, count, url_column, pictures)


def _split_line(line: bytes) -> list[str]:
    """Caption and link, or link and caption; nothing where these are not two texts."""
    try:
        columns = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return []
    return columns if len(columns) == 2 else []


def _read_rows(path: Path, rows: Rows) -> Iterator[Sample | Problem]:
    with path.open("rb") as file:
        file.seek(rows.offset)
        for index, data in zip(range(rows.count), file, strict=False):
            where = f"{path.name}:{rows.line + index}"
            columns = _split_line(data)
            if not columns:
                yield Problem(where, "bad line", f"not two columns of UTF-8: {data[:80]!r}")
                continue
            key = f"{rows.first + index:08}"
            url, caption = columns[rows.url_column], columns[1 - rows.url_column]
            image = read_file(rows.pictures, f"{key}.jpg", where)
            sample = Sample(where, key, None, str(rows.pictures / f"{key}.jpg"), caption, url, missing="dead link")
            if not isinstance(image, Problem):
                sample.image = image
            elif image.reason != "image missing":
                sample.fault = image.detail
            yield sample


def _read_stats(pieces: list[Piece]) -> tuple[list[Problem], list[str]]:
    """The links that did not become pictures, shards that are lost, and a note on those that tell nothing of theirs."""
    paths = [piece.path for piece in pieces if piece.rows is None]
    there = {path.with_name(f"{path.stem}_stats.json") for path in paths}
    told = {file for place in {path.parent for path in paths} for file in place.glob("*_stats.json")}
    problems = []
    for file in sorted(told | there):
        stats = img2dataset.stats(file.with_name(file.name.replace("_stats.json", ".tar")))
        for reason, key in zip(_DEAD, ("failed_to_download", "failed_to_resize"), strict=True):
            if stats.get(key):
                problems.append(
                    Problem(img2dataset.where(file), reason, f"{stats[key]:,} of {stats['count']:,}", stats[key])
                )
        if stats.get("successes") and file not in there:
            detail = f"there is no {file.name.replace('_stats.json', '.tar')}, nor a folder"
            problems.append(Problem(img2dataset.where(file), "shard missing", detail, stats["successes"]))
    without = sum(not img2dataset.stats(path) for path in paths)
    note = f"shards without a readable _stats.json, whose dead links are not counted: {without:,}"
    return problems, [note] if without else []


def _described(pieces: list[Piece], folder: Path) -> str:
    """Names, sizes and counts, as the files are too large for a checksum of what they hold."""
    paths = {piece.path for piece in pieces} | {piece.rows.pictures for piece in pieces if piece.rows}
    lines = []
    for path in sorted(paths):
        size = len(os.listdir(path)) if path.is_dir() else path.stat().st_size
        lines.append(f"{path.relative_to(folder)} {size} {sorted(img2dataset.stats(path).items())}")
    return f"{len(lines):,}, names and sizes with SHA-256 {hashlib.sha256(repr(lines).encode()).hexdigest()[:16]}"


def _size(parts: list[Piece]) -> int:
    """Links in the lists; 0 where that is not known of all."""
    sizes = [part.rows.count if part.rows else img2dataset.stats(part.path).get("count", 0) for part in parts]
    return sum(sizes) if all(sizes) else 0
