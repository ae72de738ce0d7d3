"""What a data set is prepared from: a `Source`, made of parts, each of which gives the examples of one shard.

A reader (`records`, `coco`, ...) finds out what there is and returns a source; `prepare.prepare` does the rest. Parts
are sent to the processes that write them, so they say where pictures lie rather than hold them.
"""

import dataclasses
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tensorflow_datasets.core import hashing

from clipcap_jax import pictures
from clipcap_jax.datasets.schema import Example
from clipcap_jax.errors import UserError

# Examples in a shard. Few enough that a restart loses little, many enough that millions do not make too many files.
PICTURES_PER_SHARD = 1000
EMBEDDINGS_PER_SHARD = 10_000


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why something in the user's files was skipped."""

    where: str  # file and line: "captions.jsonl:17"
    reason: str  # its kind, by which the summary counts: "image missing"
    detail: str
    count: int = 1  # of what was skipped

    def __post_init__(self) -> None:
        for name in ("where", "detail"):  # names in archives may be any bytes, and JSON can spell half a character
            printable = getattr(self, name).encode(errors="backslashreplace").decode()
            object.__setattr__(self, name, printable)

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


def first_problems(problems: Sequence[Problem]) -> str:
    """The first ten, a line each."""
    lines = [f"  {problem}" for problem in problems[:10]]
    return "\n".join(lines + [f"  and {len(problems) - 10:,} more"] * (len(problems) > 10))


@dataclasses.dataclass(slots=True)
class Record:
    """A picture and its captions, as a file of the user's has them."""

    where: str  # file and line it starts at
    image: str  # file name
    image_id: str  # "" where not given, until `tidy.name_pictures` has made one
    captions: list[str]
    split: str  # "" where not given
    embedding_row: int | None = None  # None where not given
    domain: str = ""
    joins: bool = dataclasses.field(default=False, compare=False)  # whether it may be one of several of a picture


@dataclasses.dataclass(frozen=True)
class Part:
    """What one shard holds.

    Attributes:
      split: of all its examples.
      read: gives them, and what was skipped, in a fixed order; it can be pickled, as a `functools.partial` can.
      count: how many those are, for the progress; 0 where that is not known.
      holds: tells it from the part that was there in its place when a preparation began that goes on now, where the
        source's `origin` does not; "" where that does.
    """

    split: str
    read: Callable[[], Iterator[Example | Problem]]
    count: int = 0
    holds: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is to be prepared.

    Attributes:
      name: the data set, as TFDS names it: "coco", or builder and config as in "records/mine".
      origin: all that decides the content, as JSON values; what was prepared from another origin is not mixed with it.
      found: where that was found, such as folders and file names, as JSON values; told, but it decides nothing.
      renewed: names of `origin`'s values; a data set of which nothing but these differs is prepared anew, in its place.
      root: the folder that examples' `image_path` starts from; "" where they lie nowhere.
      parts: one for each shard; those of a split in the order that the split will have.
      has_images: whether examples hold the encoded picture.
      embedding_width: E, or None where examples hold no embedding.
      encoder: what made the embeddings, such as "ViT-B/32"; None where that is not known.
      problems: what was skipped so far.
      records: how many there were, skipped ones included, by which the share of problems is told; None: as many as were
        kept or skipped.
      expected: reasons that do not count as problems, such as links of the web that are dead.
      notes: what else the user should know.
      description, homepage, citation: for TFDS's own metadata.
      metadata: anything else to store, as JSON values.
    """

    name: str
    origin: Mapping[str, Any]
    parts: Sequence[Part]
    has_images: bool
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renewed: Sequence[str] = ()
    root: str = ""
    embedding_width: int | None = None
    encoder: str | None = None
    problems: Sequence[Problem] = ()
    records: int | None = None
    expected: Sequence[str] = ()
    notes: Sequence[str] = ()
    description: str = "Pictures with captions."
    homepage: str = ""
    citation: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_pictures(
    records: Sequence[Record], folder: Path | None, store_images: bool, embeddings: str | None
) -> Iterator[Example | Problem]:
    """Examples of records.

    Args:
      records: those of a shard.
      folder: where their `image` is looked up; None: there are no pictures.
      store_images: whether examples hold the pictures, or only say where they lie.
      embeddings: a file that `open_embeddings` opens; None: there are none.
    """
    matrix = None if embeddings is None else open_embeddings(embeddings)
    for record in records:
        embedding = None if matrix is None else matrix[record.embedding_row]
        if embedding is not None and (fault := _embedding_fault(embedding)):
            yield Problem(record.where, fault[0], f"row {record.embedding_row} {fault[1]}")
            continue
        image = None if folder is None else read_picture(folder, record.image, record.where)
        if isinstance(image, Problem):
            yield image
            continue
        yield Example(
            image=image if store_images else None,
            embedding=None if embedding is None else embedding.astype(np.float16),
            image_path="" if folder is None else record.image,
            image_id=record.image_id,
            captions=tuple(record.captions),
            domain=record.domain,
            picture="" if image is None or store_images else pictures.digest(image),
        )


T = TypeVar("T")


def by_hash(items: Sequence[T], split: str, image_id: Callable[[T], str]) -> list[T]:
    """In the order of TFDS's own writer, by a hash of the image_id, so that any stretch of a split is a fair sample."""
    hasher = hashing.Hasher(split)
    return sorted(items, key=lambda item: hasher.hash_key(image_id(item)))


def picture_parts(
    records: Sequence[Record], folder: Path | None, *, store_images: bool = True, embeddings: str | None = None
) -> list[Part]:
    """Parts that `read_pictures` reads: train, val and test first, each in the order of `by_hash`."""
    names = {record.split for record in records}
    usual = [split for split in ("train", "val", "test") if split in names]
    size = PICTURES_PER_SHARD if store_images else EMBEDDINGS_PER_SHARD
    parts = []
    for split in usual + sorted(names.difference(usual)):
        chosen = by_hash([record for record in records if record.split == split], split, lambda record: record.image_id)
        for start in range(0, len(chosen), size):
            some = chosen[start : start + size]
            read = functools.partial(read_pictures, some, folder, store_images, embeddings)
            # Pictures that have come or gone move others from part to part.
            holds = hashlib.sha256(repr(some).encode()).hexdigest()
            parts.append(Part(split, read, len(some), holds))
    return parts


def leads_out(name: str) -> bool:
    """Whether a file name may lead out of the folder in which it is looked up; links that lie there are the user's."""
    return os.path.isabs(name) or ".." in name.split("/")


def read_picture(folder: Path, name: str, where: str) -> bytes | Problem:
    """The bytes of a picture file that can be decoded, or why there are none.

    Raises:
      OSError: the disk or the network failed, so that another time it may be there.
    """
    data = read_file(folder, name, where)
    return data if isinstance(data, Problem) else broken_picture(data, where, str(folder / name)) or data


def read_file(folder: Path, name: str, where: str) -> bytes | Problem:
    """The bytes of a file, or why there are none.

    Raises:
      OSError: the disk or the network failed, so that another time it may be there.
    """
    if leads_out(name):
        return Problem(where, "image outside the folder", name)
    path = folder / name
    try:
        return pictures.read(path)
    except FileNotFoundError:
        return Problem(where, "image missing", str(path))
    except (NotADirectoryError, PermissionError, ValueError, UserError) as error:
        return Problem(where, "image unreadable", str(error))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return Problem(where, "image unreadable", str(error))


def broken_picture(data: bytes, where: str, name: str) -> Problem | None:
    """What is wrong with the bytes of a picture, if anything is."""
    try:
        pictures.decode(data)
    except UserError as error:
        return Problem(where, "image broken", f"{name}: {error}")
    return None


def open_embeddings(path: str) -> np.ndarray:
    """A `.npy` file's matrix: float, shape (rows, E), memory-mapped.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        matrix = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"The embeddings file {path} does not exist.") from None
    except Exception:  # on a damaged header NumPy raises nearly anything, and its own words speak of pickles
        raise UserError(f"{path} is not a matrix saved by numpy.save.") from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise UserError(f"{path} must hold one matrix of floating-point numbers (numpy.save), a row for each picture.")
    return matrix


def _embedding_fault(embedding: np.ndarray) -> tuple[str, str] | None:
    if not np.isfinite(embedding).all():
        return "embedding not finite", "holds NaN or infinity"
    with np.errstate(over="ignore"):
        stored = embedding.astype(np.float16)
    if not np.isfinite(stored).all():
        return "embedding too large", "exceeds float16's 65504"
    return None if stored.any() else ("embedding all zero", "is 0 everywhere")
