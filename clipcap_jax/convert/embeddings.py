"""The original's embedding files, `oscar_split_*_train.pkl`, without torch and without running what is in them.

Its `parse_coco.py` pickles a dict: `clip_embedding` is a tensor with a row for each caption, `captions` a list of dicts
with `image_id`, `caption`, and the caption's row as `clip_embedding`. Others write a row for each picture, which its
captions share, a parameter, or an array of NumPy.

A pickle is a program; this reader knows the few names that such a file needs and refuses all others. A tensor's storage
lies in it as bytes, in which torch wrote further pickles: they are read the same way. A few hundred bytes of pickle may
be lists of each other that no memory holds as a text: messages say what type a value has, not the value.
"""

import collections
import io
import math
import mmap
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from clipcap_jax import files
from clipcap_jax.errors import UserError

# torch.serialization, `_legacy_save`: four pickles and the list of keys, then each storage's length and elements.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_BFLOAT16 = "bfloat16"  # the upper half of a float32; not a type of NumPy's own
_STORAGES = {"HalfStorage": "f2", "FloatStorage": "f4", "DoubleStorage": "f8", "BFloat16Storage": _BFLOAT16}
_TYPES = ("f2", "f4", "f8", "i4", "i8", _BFLOAT16)


class _Refused(Exception):
    """The pickle is whole, but not one of embeddings and captions."""


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, as which pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise _Refused("bytes in it are not written as latin1")
    return text.encode(encoding)


_Python: Any = vars(pickle)["_Unpickler"]  # C's takes memory for every number that a pickle gives to a value


class _Unpickler(_Python):
    """Knows the names given, and no others."""

    def load_bytearray(self) -> None:
        """Python's makes it with the length that a pickle claims, before it reads it."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar[Any] = {**_Python.dispatch, pickle.BYTEARRAY8[0]: load_bytearray}

    def __init__(self, file: io.BytesIO | mmap.mmap, names: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self._names = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_codecs", "encode"): _encode,
            **names,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _Refused(f"it asks for {module:.80}.{name:.80}, which an embedding file has no need of")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _numbers(data: bytes | bytearray, kind: str, count: int, byte_order: str = "<") -> np.ndarray:
    if kind == _BFLOAT16:
        return (np.frombuffer(data, f"{byte_order}u2", count).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, f"{byte_order}{kind}", count)


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise _Refused("a matrix in it has no shape")


def _load_storage(data: bytes) -> np.ndarray:
    """What `torch.storage._load_from_bytes` does."""
    file = io.BytesIO(data)
    storages = {("torch", name): kind for name, kind in _STORAGES.items()}

    def load() -> Any:
        return _Unpickler(file, storages).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise _Refused("a tensor in it is not as torch writes it")
    load()  # the writer's byte order and sizes of integers; the data is little-endian everywhere
    what, kind, key, *_ = load()
    if what != "storage" or kind not in _STORAGES.values() or not isinstance(key, str) or load() != [key]:
        raise _Refused("a tensor in it is not one storage of floating-point numbers")
    (count,) = struct.unpack("<q", file.read(8))
    return _numbers(file.read(), kind, count)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """What `torch._utils._rebuild_tensor_v2` does, for tensors that lie in one piece."""
    _check_shape(size)
    count = math.prod(size)
    contiguous = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if stride != contiguous or not 0 <= offset <= len(storage) - count:
        raise _Refused("a tensor in it does not lie in one piece of its storage")
    return storage[offset : offset + count].reshape(size)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    """What `torch._utils._rebuild_parameter` does, but for gradients."""
    return tensor


class _DType:
    """`numpy.dtype`, of numbers alone."""

    def __init__(self, kind: Any, *_: Any):
        if kind not in _TYPES:
            raise _Refused("an array in it is not of numbers")
        self.kind, self.byte_order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        _, byte_order, *_ = state
        self.byte_order = ">" if byte_order == ">" else "<"


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray:
    """What `numpy._core.numeric._frombuffer` does."""
    _check_shape(shape)
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise _Refused("an array in it is not as NumPy writes it")
    return _numbers(data, dtype.kind, math.prod(shape), dtype.byte_order).reshape(shape, order=order)


class _Array:
    """What `numpy._core.multiarray._reconstruct` makes: an array whose contents are to follow."""

    def __init__(self, *_: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if is_fortran else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    """What `numpy._core.multiarray.scalar` does, as a number of Python's."""
    return _from_buffer(data, dtype, (), "C").item()


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "matrix"): "matrix",
    ("numpy", "dtype"): _DType,
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    **{
        (f"numpy.{core}.{module}", name): function  # before NumPy 2, and since
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


def read_pickle(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Embeddings and captions of the original's file.

    Returns:
      The embeddings, float `n E`, and for each picture `image_id`, `captions` and `embedding_row`, as the captions file
      of `clipcap prepare records` has them. The original embeds a picture once for each of its captions: the first row
      stands for all. Captions may share a row, if they say that they are of one picture.

    Raises:
      UserError: the file is not there, is not whole, or holds anything but embeddings and captions.
    """
    try:
        # A file would make room for whatever a pickle asks to be read of it; this, for what there is.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            stored = _Unpickler(content, _NAMES).load()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except _Refused as error:
        raise UserError(f"{path} was not loaded: {error}") from error
    except Exception as error:  # pickle names what broken data may raise only by example
        raise UserError(f"{path} is not a whole pickle: {error!r:.200}. Copy it again.") from error

    def wrong(what: str) -> NoReturn:
        raise UserError(f"{path} is not an embedding file of the original: {what}")

    if not isinstance(stored, dict) or not {"clip_embedding", "captions"} <= set(stored):
        wrong('it does not hold "clip_embedding" and "captions"')
    embeddings, captions = stored["clip_embedding"], stored["captions"]
    if isinstance(embeddings, _Array):
        embeddings = embeddings.array
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        wrong('"clip_embedding" is no matrix of floating-point numbers')
    pictures: dict[str, dict[str, Any]] = {}
    owners: dict[int, str | None] = {}
    for i, entry in enumerate(captions if isinstance(captions, list) else wrong('"captions" is no list')):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            wrong(f"entry {i} of its captions has no text")
        row = entry.get("clip_embedding")
        if not isinstance(row, int):
            wrong(f"entry {i} of its captions has a row that is no number, but of type {type(row).__name__}")
        if not 0 <= row < len(embeddings):
            wrong(f"entry {i} of its captions points to a row that is none of the {len(embeddings)}")
        named = entry.get("image_id")
        if not isinstance(named, str | None) and not (isinstance(named, int) and abs(named) < 2**63):
            wrong(f"entry {i} of its captions has an image_id of type {type(named).__name__}, no text and no number")
        owner = None if named is None else str(named)
        if row in owners and (owner is None or owner != owners[row]):
            wrong(
                f"entry {i} of its captions points to row {row}, as one of another picture does. The original's script "
                "for Conceptual Captions writes such files, in which captions have the embeddings of other pictures"
            )
        owners[row] = owner
        image_id = str(row) if owner is None else owner
        picture = pictures.setdefault(image_id, {"image_id": image_id, "captions": [], "embedding_row": row})
        picture["captions"].append(entry["caption"])
    return embeddings, list(pictures.values())


def convert_pickle(path: Path, embeddings: Path, captions: Path) -> tuple[int, int]:
    """Write a file of the original's as what `clipcap prepare records` reads.

    Args:
      path: the pickle.
      embeddings: the `.npy` file to write, a row for each picture.
      captions: the `.jsonl` file to write.

    Returns:
      How many pictures and how many captions there are.
    """
    if embeddings.suffix != ".npy":
        raise UserError(f"{embeddings}: the name has to end in .npy")
    matrix, pictures = read_pickle(path)
    with files.whole(embeddings) as partial:
        with partial.open("wb") as file:
            np.save(file, matrix[[picture["embedding_row"] for picture in pictures]])
        with files.whole(captions) as partial_captions, partial_captions.open("w", encoding="utf-8") as lines:
            for row, picture in enumerate(pictures):
                lines.write(files.to_json({**picture, "embedding_row": row}) + "\n")
    return len(pictures), sum(len(picture["captions"]) for picture in pictures)
