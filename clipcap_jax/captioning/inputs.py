"""Whatever people have a picture or an embedding in becomes what the model reads."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipcap_jax import pictures
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import addresses

_CHECKED_AT_ONCE = 65536  # rows of a matrix, which may be larger than the memory
_TAKEN = (
    "a path, an http(s) address, the bytes of a file, a Pillow picture, a uint8 array `H W 3`, or a float array `E`, "
    "which is an embedding"
)


def is_one(given: Any) -> bool:
    """Whether this is one picture or embedding, and not several.

    Raises:
      UserError: it is neither.
    """
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(given, "read"):
        return True
    if hasattr(given, "ndim"):
        return np.ndim(given) % 2 == 1 and not _is_list(np.asarray(given))
    if isinstance(given, Iterable):
        return False
    raise _not_taken(given)


def name_of(given: Any, index: int | None) -> str:
    """How a message names it; `index`: which of several it is."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    return "the input" if index is None else f"input {index} (counted from 0)"


def _is_list(array: np.ndarray) -> bool:
    """Such as a column of paths."""
    return array.ndim == 1 and array.dtype.kind in "OUST"


def _not_taken(given: Any) -> UserError:
    return UserError(f"cannot caption a {type(given).__name__}: give {_TAKEN}, or several of them")


@dataclasses.dataclass(frozen=True)
class InputReader:
    """Reads for one model, of which `metadata` says what it takes."""

    metadata: Metadata

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the pictures it reads; None: it has no vision tower and reads embeddings alone."""
        clip = self.metadata.config.model.clip
        return clip.image_size if clip else None

    @property
    def takes_embeddings(self) -> bool:
        return self.metadata.config.data.input == "embedding"

    def embedding_kind(self) -> str:
        encoder = self.metadata.encoder or "an encoder that it does not name"
        return f"embeddings of width {self.metadata.embedding_width} from {encoder}"

    def several(self, given: Any, *, whole: bool) -> Iterable[Any]:
        """Pictures and embeddings one by one; with `whole`, a matrix of embeddings is checked before.

        Raises:
          UserError: the model does not take such arrays.
        """
        if not hasattr(given, "ndim"):
            several: Iterable[Any] = given
            return several
        array = np.asarray(given)
        if not _is_list(array) and (array.ndim not in (2, 4) or (array.ndim == 2 and whole)):
            self.check_embeddings(array)
        return array

    def __call__(self, given: Any) -> np.ndarray:
        """A picture, uint8 `H W 3`, as the model wants it, or an embedding, float32 `E`.

        Raises:
          UserError: it cannot be read, or the model does not take such; or a disk does not answer.
        """
        if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
            return self._picture(given)
        if hasattr(given, "read"):
            return self._picture(pictures.read_stream(given))
        if not hasattr(given, "ndim"):
            raise _not_taken(given)
        array = np.asarray(given)
        if array.ndim != 3:
            self.check_embeddings(array[None] if array.ndim == 1 else array)
            return array.astype(np.float32)
        if self.image_size is not None and (array.dtype != np.uint8 or array.shape[2] != 3):
            raise UserError(f"a picture is a uint8 array `H W 3`, not {array.dtype} of the shape {array.shape}")
        return self._picture(array)

    def _picture(self, given: Any) -> np.ndarray:
        if self.image_size is None:
            raise Hopeless(
                f"this checkpoint was trained on {self.embedding_kind()}, not on pictures: embed the pictures with "
                "that encoder and give the matrix (.npy, one row per picture)"
            )
        match given:
            case Image.Image():
                picture = pictures.to_rgb(given)
            case np.ndarray():
                picture = pictures.to_rgb(Image.fromarray(given))
            case Path():  # as it is: that of a tar's member knows where to read
                picture = pictures.decode(_read(given))
            case str() | os.PathLike():
                picture = pictures.decode(_read(addresses.picture(os.fspath(given))))
            case _:
                picture = pictures.decode(bytes(given))
        return pictures.preprocess(picture, self.image_size)

    def check_embeddings(self, matrix: np.ndarray) -> None:
        """Raise a `UserError` unless these are embeddings, `n E`, that the model takes."""
        if not self.takes_embeddings:
            raise UserError(
                f"this checkpoint was trained on pictures and cannot caption embeddings, as {matrix.dtype} of the "
                f"shape {matrix.shape} would be: a picture is a uint8 array `H W 3`, a grey one too"
            )
        if matrix.dtype.kind not in "fiu" or not matrix.ndim:
            raise UserError(f"no matrix of numbers, but {matrix.dtype} of the shape {matrix.shape}")
        if matrix.shape[1:] != (self.metadata.embedding_width,):
            raise UserError(
                f"the embeddings have the shape {matrix.shape}; this checkpoint was trained on {self.embedding_kind()}"
            )
        bad: list[int] = []
        for start in range(0, len(matrix), _CHECKED_AT_ONCE):
            with np.errstate(over="ignore"):  # beyond float32
                rows = matrix[start : start + _CHECKED_AT_ONCE].astype(np.float32)
            bad.extend(start + np.flatnonzero(~np.isfinite(rows).all(axis=1) | ~rows.any(axis=1)))
        if bad:
            where = f", the first in row {bad[0]} (counted from 0)" if len(matrix) > 1 else ""
            raise UserError(f"{len(bad)} embeddings are not finite in float32, or 0 everywhere{where}")


class Hopeless(UserError):
    """Something is wrong that would be wrong with any other picture too."""


def _read(picture: addresses.Picture) -> bytes:
    try:
        return addresses.read(picture)
    except TimeoutError as error:
        raise Hopeless(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in its name
        raise UserError(f"cannot be read: {error}") from error
