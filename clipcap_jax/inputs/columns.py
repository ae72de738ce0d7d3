"""Raw copies of what a split holds, field by field, that are mapped into memory instead of read.

array_record is compressed, and an example is read as a whole. So the first opening of a split writes, beside the data
set, `columns/<split>-<fingerprint>-<format>/` with

    embeddings.npy                                float16 N E, where the data set stores embeddings
    image_ids, pictures, image_paths, domains,    texts: `<name>.npy`, the UTF-8 bytes of all of them, and
    captions                                      `<name>_offsets.npy`, int64 (texts + 1,), where each begins
    examples_offsets.npy                          int64 (N + 1,), where each example's captions begin among all

of the whole split; a part of one, such as "val[:100]", is a part of these. Where the data set cannot be written to, or
lies on gs://, they go to `~/.cache/clipcap_jax/columns`. Columns may be deleted at any time.
A file `sha256.json` has the digests of the others, which are held to it whenever they are opened.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from clipcap_jax import files, progress
from clipcap_jax.datasets.schema import Split
from clipcap_jax.errors import UserError

_FORMAT = "2"  # of the files; another one makes them anew

_DIGESTS = "sha256.json"

T = TypeVar("T")


class Ragged(Sequence[T]):
    """Items of different lengths that are made when asked for: item i of `values[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, values: Any, offsets: np.ndarray, make: Callable[[Any], T]):
        self.values, self.offsets, self.make = values, offsets, make

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        return self.make(self.values[int(self.offsets[i]) : int(self.offsets[i + 1])])

    def part(self, start: int, stop: int) -> "Ragged[T]":
        """Items `start` to `stop`, nothing copied."""
        return Ragged(self.values, self.offsets[start : stop + 1], self.make)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a split.

    embeddings: float16 `N E`, read-only, or None where there are none; image_ids, pictures, image_paths, domains: a
    string per example; captions: a tuple of strings per example; all_captions: those of the whole split; homes: the
    folders for what else is made of the split once; name: with which its name begins there.
    """

    embeddings: np.ndarray | None
    image_ids: Ragged[str]
    pictures: Ragged[str]
    image_paths: Ragged[str]
    domains: Ragged[str]
    captions: Ragged[tuple[str, ...]]
    all_captions: Ragged[tuple[str, ...]]
    homes: Sequence[Path]
    name: str


def open_columns(split: Split) -> Columns:
    """Open the columns of a split, which the first time writes them.

    Raises:
      UserError: the data set's files are not there, an embedding is not finite, the columns cannot be written, or are
        damaged.
    """
    name = f"{split.whole}-{split.fingerprint}-{_FORMAT}"
    homes = [files.home() / "columns"]
    if not files.is_remote(split.folder):
        homes.insert(0, Path(split.folder) / "columns")
    folder = made_once(name, homes, lambda temporary: _write_columns(temporary, split))

    root = split.root

    def texts(name: str) -> Ragged[str]:
        values, offsets = load(folder, name, f"{name}_offsets")
        return Ragged(values, offsets, lambda value: value.tobytes().decode())

    def part(name: str) -> Ragged[str]:
        return texts(name).part(split.start, split.stop)

    def located(paths: Ragged[str]) -> Ragged[str]:
        read = paths.make
        return Ragged(paths.values, paths.offsets, lambda value: (path := read(value)) and os.path.join(root, path))

    (examples,) = load(folder, "examples_offsets")
    captions: Ragged[tuple[str, ...]] = Ragged(texts("captions"), examples, tuple)
    return Columns(
        embeddings=None if split.embedding_width is None else load(folder, "embeddings")[0][split.start : split.stop],
        image_ids=part("image_ids"),
        pictures=part("pictures"),
        image_paths=located(part("image_paths")),
        domains=part("domains"),
        captions=captions.part(split.start, split.stop),
        all_captions=captions,
        homes=homes,
        name=name,
    )


def made_once(name: str, homes: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """As `files.once`, with the digests of what was written, by which what is there is checked.

    Raises:
      UserError: a file is not what was written; or as `files.once`.
    """

    def sealed(folder: Path) -> None:
        write(folder)
        (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))

    folder = files.once(name, homes, sealed)
    try:
        written, there = json.loads((folder / _DIGESTS).read_text()), _digests(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error}. Delete it; it is made again.") from error
    if damaged := sorted(name for name in {**written, **there} if written.get(name) != there.get(name)):
        raise UserError(
            f"{folder / damaged[0]} is damaged: it is not what was written. Delete {folder}; it is made again."
        )
    return folder


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("*.npy"))
    with ThreadPoolExecutor() as pool:  # hashing needs no lock of Python's
        return {path.name: digest for path, digest in zip(paths, pool.map(files.digest, paths), strict=True)}


def load(folder: Path, *names: str) -> list[np.ndarray]:
    """Map the files `<name>.npy` of a folder that `files.once` made, read-only.

    Raises:
      UserError: one is missing or shorter than it says.
    """
    try:
        # As plain arrays: numpy.memmap's own indexing is slower.
        return [np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error}. Delete it; it is made again.") from error


def _write_columns(folder: Path, split: Split) -> None:
    """Write the columns of the whole split, of which never more than some examples are in memory."""
    name, width = f"{split.name}/{split.whole}", split.embedding_width
    with contextlib.ExitStack() as stack:
        ids, pictures, paths, domains, captions = (
            stack.enter_context(TextWriter(folder, name))
            for name in ("image_ids", "pictures", "image_paths", "domains", "captions")
        )
        ends = stack.enter_context(ArrayWriter(folder / "examples_offsets.npy", np.int64))
        ends.extend([0])
        embeddings = (
            None if width is None else stack.enter_context(ArrayWriter(folder / "embeddings.npy", np.float16, width))
        )
        bar = stack.enter_context(progress.bar())
        task = bar.add_task(f"Unpacking {name}", total=sum(split.shard_lengths))
        for examples in split.read_whole():
            if embeddings is not None:
                rows = np.stack([np.asarray(example.embedding) for example in examples])
                if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
                    raise UserError(
                        f"{name}: the embedding of {examples[bad[0]].image_id!r} holds NaN or infinity. Mend it and "
                        "prepare the data set again."
                    )
                embeddings.extend(rows)
            ids.extend([example.image_id for example in examples])
            pictures.extend([example.picture for example in examples])
            paths.extend([example.image_path for example in examples])
            domains.extend([example.domain for example in examples])
            ends.extend(captions.count + np.cumsum([len(example.captions) for example in examples]))
            captions.extend([caption for example in examples for caption in example.captions])
            bar.advance(task, len(examples))


class ArrayWriter:
    """Writes a `.npy` file row by row, in a `with` statement."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, *row: int):
        self._file, self._dtype, self._row, self.count = path.open("wb"), np.dtype(dtype), row, 0

    def __enter__(self) -> Self:
        self._write_header()
        return self

    def extend(self, rows: npt.ArrayLike) -> None:
        """Write one row or several."""
        array = np.asarray(rows, self._dtype).reshape(-1, *self._row)
        self._file.write(array.tobytes())
        self.count += len(array)

    def _write_header(self) -> None:
        # NumPy leaves room for the number of rows to grow, so that every header has the same length.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()


class TextWriter:
    """Writes `<name>.npy` and `<name>_offsets.npy` for texts, in a `with` statement."""

    def __init__(self, folder: Path, name: str):
        self._bytes = ArrayWriter(folder / f"{name}.npy", np.uint8)
        self._offsets = ArrayWriter(folder / f"{name}_offsets.npy", np.int64)
        self.count = 0

    def __enter__(self) -> Self:
        self._bytes.__enter__()
        self._offsets.__enter__().extend([0])
        return self

    def extend(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._offsets.extend(self._bytes.count + np.cumsum([len(text) for text in encoded]))
        self._bytes.extend(np.frombuffer(b"".join(encoded), np.uint8))
        self.count += len(texts)

    def __exit__(self, *error: object) -> None:
        try:
            self._bytes.__exit__(*error)
        finally:
            self._offsets.__exit__(*error)
