"""The original's embedding files, `oscar_split_*_train.pkl`, without torch and without running what is in them.

Its `parse_coco.py` pickles a dict: `clip_embedding` is a tensor with a row for each caption, `captions` a list of dicts
with `image_id`, `caption`, and the caption's row as `clip_embedding`.

A pickle is a program; this reader knows the few names that such a file needs and refuses all others. A tensor's storage
lies in it as bytes, in which torch wrote further pickles: they are read the same way.
"""

import collections
import io
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from clipcap_jax import files
from clipcap_jax.errors import UserError

# torch.serialization, `_legacy_save`: four pickles and the list of keys, then each storage's length and elements.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_STORAGES = {"HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8"}


class _Refused(Exception):
    """The pickle is whole, but not one of embeddings and captions."""


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, as which pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise _Refused(f"bytes in it are written as {encoding!r}")
    return text.encode(encoding)


class _Unpickler(pickle.Unpickler):
    """Knows the names given, and no others."""

    def __init__(self, file: io.BufferedIOBase, names: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self._names = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_codecs", "encode"): _encode,
            **names,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _Refused(f"it asks for {module}.{name}, which an embedding file has no need of")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _load_storage(data: bytes) -> np.ndarray:
    """What `torch.storage._load_from_bytes` does."""
    file = io.BytesIO(data)
    storages = {("torch", name): dtype for name, dtype in _STORAGES.items()}

    def load() -> Any:
        return _Unpickler(file, storages).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise _Refused("a tensor in it is not as torch writes it")
    load()  # the writer's byte order and sizes of integers; the data is little-endian everywhere
    kind, dtype, key, *_ = load()
    if kind != "storage" or dtype not in _STORAGES.values() or load() != [key]:
        raise _Refused("a tensor in it is not one storage of floating-point numbers")
    (count,) = struct.unpack("<q", file.read(8))
    return np.frombuffer(file.read(), dtype, count)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """What `torch._utils._rebuild_tensor_v2` does, for tensors that lie in one piece."""
    count = int(np.prod(size))
    contiguous = tuple(int(np.prod(size[i + 1 :])) for i in range(len(size)))
    if tuple(stride) != contiguous or not 0 <= offset <= len(storage) - count:
        raise _Refused("a tensor in it does not lie in one piece of its storage")
    return storage[offset : offset + count].reshape(size)


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


def read_pickle(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Embeddings and captions of the original's file.

    Returns:
      The embeddings, float `n E`, and for each picture `image_id`, `captions` and `embedding_row`, as the captions file
      of `clipcap prepare records` has them. The original embeds a picture once for each of its captions: the first row
      stands for all.

    Raises:
      UserError: the file is not there, is not whole, or holds anything but embeddings and captions.
    """
    try:
        with path.open("rb") as file:
            stored = _Unpickler(file, _NAMES).load()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except _Refused as error:
        raise UserError(f"{path} was not loaded: {error}") from error
    except Exception as error:  # pickle names what broken data may raise only by example
        raise UserError(f"{path} is not a whole pickle: {error!r}. Copy it again.") from error

    def wrong(what: str) -> NoReturn:
        raise UserError(f"{path} is not an embedding file of the original: {what}")

    if not isinstance(stored, dict) or not {"clip_embedding", "captions"} <= set(stored):
        wrong('it does not hold "clip_embedding" and "captions"')
    embeddings, captions = stored["clip_embedding"], stored["captions"]
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2:
        wrong('"clip_embedding" is no matrix')
    pictures: dict[str, dict[str, Any]] = {}
    rows: set[int] = set()
    for i, entry in enumerate(captions if isinstance(captions, list) else wrong('"captions" is no list')):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            wrong(f"entry {i} of its captions has no text")
        row = entry.get("clip_embedding")
        if not isinstance(row, int) or not 0 <= row < len(embeddings):
            wrong(f"entry {i} of its captions points to row {row!r} of {len(embeddings)}")
        if row in rows:
            wrong(
                f"entry {i} of its captions points to row {row}, as another one does. The original's script for "
                "Conceptual Captions writes such files, in which captions have the embeddings of other pictures"
            )
        rows.add(row)
        image_id = str(entry.get("image_id", row))
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
