import io
import json
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hostile import Evil
from pytorch import import_torch

from clipcap_jax.convert import embeddings
from clipcap_jax.datasets import RecordsSource, open_split, prepare_records
from clipcap_jax.errors import UserError

MATRIX = np.arange(20, dtype=np.float32).reshape(5, 4) / 7
ENTRIES: list[dict[str, Any]] = [  # as parse_coco.py writes them: a row for each caption, the pictures in any order
    {"image_id": "318556", "id": 48, "caption": "A very clean bathroom", "clip_embedding": 0},
    {"image_id": "116100", "id": 67, "caption": "A panoramic kitchen", "clip_embedding": 1},
    {"image_id": "318556", "id": 126, "caption": "A blue and white bathroom", "clip_embedding": 2},
    {"image_id": 379340, "id": 173, "caption": "Ein Zug, ☃", "clip_embedding": 3},
    {"image_id": "116100", "id": 148, "caption": "A kitchen", "clip_embedding": 4},
]


PythonPickler: Any = vars(pickle)["_Pickler"]  # whose `save` can be overridden


class Named:
    """Pickled as a reference to a module's name, whatever stands there."""

    def __init__(self, module: str, name: str):
        self.reference = f"c{module}\n{name}\n".encode()


class Call:
    """Pickled as a call of what a name stands for."""

    def __init__(self, function: Named, *arguments: Any):
        self.function, self.arguments = function, arguments


class Persistent:
    """Pickled as torch pickles a storage: as an id, with the data elsewhere."""

    def __init__(self, *pid: Any):
        self.pid = pid


class Pickler(PythonPickler):
    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named):
            self.write(value.reference)
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)

    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Persistent) else None


def dumps(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def storage(array: np.ndarray, kind: str = "FloatStorage", extra: Any = None, key: Any = "94") -> bytes:
    """What `torch.save(storage, _use_new_zipfile_serialization=False)` writes; `extra` goes into its third pickle."""
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": extra or {"int": 4}}
    persistent = Persistent("storage", Named("torch", kind), key, "cpu", array.size, None)
    parts = [dumps(part) for part in (0x1950A86A20F9469CFC6C, 1001, sizes, persistent, [key])]
    return b"".join(parts) + struct.pack("<q", array.size) + array.tobytes()


def tensor(array: np.ndarray, stored: bytes | None = None, stride: tuple[int, ...] | None = None) -> Call:
    return Call(
        Named("torch._utils", "_rebuild_tensor_v2"),
        Call(Named("torch.storage", "_load_from_bytes"), storage(array) if stored is None else stored),
        0,
        array.shape,
        stride or tuple(step // array.itemsize for step in array.strides),
        False,
        OrderedDict(),
    )


STORAGE = Call(Named("torch.storage", "_load_from_bytes"), storage(MATRIX))
REBUILD = Named("torch._utils", "_rebuild_tensor_v2")


def numpy_matrix(kind: Any = "f4", shape: Any = MATRIX.shape, order: Any = "C", data: Any = None) -> Call:
    data = MATRIX.tobytes() if data is None else data
    dtype = Call(Named("numpy", "dtype"), kind, False, True)
    return Call(Named("numpy._core.numeric", "_frombuffer"), data, dtype, shape, order)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(matrix: Any = None, captions: Any = ENTRIES) -> Path:
        stored = {"clip_embedding": tensor(MATRIX) if matrix is None else matrix, "captions": captions}
        (tmp_path / "oscar_split_ViT-B_32_train.pkl").write_bytes(dumps(stored))
        return tmp_path / "oscar_split_ViT-B_32_train.pkl"

    return write


EXPECTED: list[dict[str, Any]] = [
    {"image_id": "318556", "captions": ["A very clean bathroom", "A blue and white bathroom"], "embedding_row": 0},
    {"image_id": "116100", "captions": ["A panoramic kitchen", "A kitchen"], "embedding_row": 1},
    {"image_id": "379340", "captions": ["Ein Zug, ☃"], "embedding_row": 3},
]


def test_pictures_with_their_captions(write: Any) -> None:
    matrix, pictures = embeddings.read_pickle(write())
    np.testing.assert_array_equal(matrix, MATRIX)
    assert pictures == EXPECTED


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_as_torch_itself_writes_it(tmp_path: Path, dtype: str, protocol: int) -> None:
    torch = import_torch()
    matrix = torch.from_numpy(MATRIX).to(getattr(torch, dtype))
    path = tmp_path / "oscar.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": torch.cat([matrix]), "captions": ENTRIES}, protocol=protocol))
    found, pictures = embeddings.read_pickle(path)
    np.testing.assert_array_equal(found, matrix.numpy())
    assert found.dtype == dtype
    assert pictures == EXPECTED


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_parameters_and_bfloat16(tmp_path: Path, protocol: int) -> None:
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    matrix = torch.nn.Parameter(torch.from_numpy(MATRIX).to(torch.bfloat16))
    path = tmp_path / "oscar.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": matrix, "captions": ENTRIES}, protocol=protocol))
    found, pictures = embeddings.read_pickle(path)
    np.testing.assert_array_equal(found, matrix.detach().float().numpy())
    assert pictures == EXPECTED


@pytest.mark.parametrize("dtype", ["float16", "<f4", ">f4", "float64", jnp.bfloat16])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_matrices_of_numpy(tmp_path: Path, dtype: Any, protocol: int) -> None:
    for matrix in (MATRIX.astype(dtype), np.asfortranarray(MATRIX.astype(dtype)), np.asmatrix(MATRIX.astype(dtype))):
        entries = [{**entry, "clip_embedding": np.int64(entry["clip_embedding"])} for entry in ENTRIES]
        data = pickle.dumps({"clip_embedding": matrix, "captions": entries}, protocol=protocol)
        path = tmp_path / "oscar.pkl"
        for stored in (
            data,
            data.replace(b"numpy._core", b"numpy.core") if protocol == 2 else data,
        ):  # as before NumPy 2
            path.write_bytes(stored)
            found, pictures = embeddings.read_pickle(path)
            np.testing.assert_array_equal(found, np.asarray(matrix, np.float64))
            assert pictures == EXPECTED


def test_captions_that_share_their_pictures_row(write: Any) -> None:
    rows = {"318556": 0, "116100": 1, "379340": 4}
    shared = [{**entry, "clip_embedding": rows[str(entry["image_id"])]} for entry in ENTRIES]
    _, pictures = embeddings.read_pickle(write(captions=shared))
    expected = [{**picture, "embedding_row": rows[picture["image_id"]]} for picture in EXPECTED]
    assert pictures == expected


def nested() -> Any:
    """A list that holds two references to another one, and so on: 2 ** 60 brackets as a text."""
    value: Any = 1
    for _ in range(60):
        value = (value, value)
    return [value, value]


def test_a_small_file_that_stands_for_a_large_text(write: Any) -> None:
    """Nor is it made an array, or compared with another such file's."""
    bomb = nested()
    dog = {"caption": "A dog", "clip_embedding": 0}
    for matrix, captions, message in (
        (None, [{**dog, "clip_embedding": bomb}], "has a row that is no number, but of type list"),
        (None, [{**dog, "image_id": bomb}], "has an image_id of type list"),
        (None, [{**dog, "caption": bomb}], "has no text"),
        (bomb, [dog], "is no matrix"),
        (numpy_matrix(shape=(bomb, bomb)), [dog], "a matrix in it has no shape"),
        (numpy_matrix(shape=bomb), [dog], "a matrix in it has no shape"),
        (numpy_matrix(kind=bomb), [dog], "an array in it is not of numbers"),
        (numpy_matrix(data=bomb), [dog], "an array in it is not as NumPy writes it"),
        (Call(REBUILD, STORAGE, 0, (bomb, 4), (4, 1)), [dog], "a matrix in it has no shape"),
        (Call(REBUILD, STORAGE, 0, (5, 4), bomb), [dog], "does not lie in one piece"),
        (Call(REBUILD, STORAGE, bomb, (5, 4), (4, 1)), [dog], "is not a whole pickle: TypeError"),
        (tensor(MATRIX, storage(MATRIX, key=bomb)), [dog], "is not one storage of floating-point numbers"),
        (Call(Named("_codecs", "encode"), "", bomb), [dog], "bytes in it are not written as latin1"),
    ):
        path = write(matrix, captions)
        assert path.stat().st_size < 5000
        with pytest.raises(UserError, match=message) as raised:
            embeddings.read_pickle(path)
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("change", [{"kind": "O8"}, {"kind": "V4"}, {"data": bytes(79)}, {"order": "K"}])
def test_arrays_that_are_not_plain(write: Any, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"an array in it is not|is not a whole pickle"):
        embeddings.read_pickle(write(matrix=numpy_matrix(**change)))
    assert embeddings.read_pickle(write(matrix=numpy_matrix()))[0].shape == MATRIX.shape


def test_the_way_to_a_data_set(write: Any, tmp_path: Path) -> None:
    counts = embeddings.convert_pickle(write(), tmp_path / "clip.npy", tmp_path / "captions.jsonl")
    assert counts == (3, 5)
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert rows == [{**picture, "embedding_row": row} for row, picture in enumerate(EXPECTED)]
    source = RecordsSource(
        name="oscar",
        captions=str(tmp_path / "captions.jsonl"),
        embeddings=str(tmp_path / "clip.npy"),
        encoder="ViT-B/32",
        split="train",
    )
    prepare_records(source, str(tmp_path / "data"), 0.0)
    examples = {example.image_id: example for example in open_split("records/oscar", "train", str(tmp_path / "data"))}
    for picture in EXPECTED:
        example = examples[str(picture["image_id"])]
        assert list(example.captions) == picture["captions"]
        np.testing.assert_array_equal(example.embedding, MATRIX[picture["embedding_row"]].astype(np.float16))


def test_code_does_not_run_wherever_it_stands(write: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    call = Call(Named("os", "mkdir"), str(mark))
    within = storage(MATRIX, extra=call)
    for path in (
        write(captions=[call]),
        write(matrix=call),
        write(matrix=tensor(MATRIX, within)),
        write(matrix=tensor(MATRIX, storage(MATRIX, kind="load"))),
        write(matrix=Call(Named("builtins", "eval"), f"open({str(mark)!r}, 'w')")),
    ):
        with pytest.raises(UserError, match=r"was not loaded: it asks for \w+\.\w+, which an embedding file"):
            embeddings.read_pickle(path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError, match=r"it asks for posix.mkdir"):
        embeddings.read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "claim", [b"Nr\xff\xff\xff\x03", *(code + (1 << 30).to_bytes(8, "little") for code in (b"\x8d", b"\x8e", b"\x96"))]
)
def test_a_few_bytes_do_not_take_all_memory(tmp_path: Path, claim: bytes) -> None:
    """The number of a value, for which C's pickle makes room, and the lengths of a text, of bytes and of an array."""
    (tmp_path / "oscar.pkl").write_bytes(b"\x80\x05" + claim + b".")
    tracemalloc.start()
    with pytest.raises(UserError):
        embeddings.read_pickle(tmp_path / "oscar.pkl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_file_that_is_not_whole(write: Any) -> None:
    path = write()
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is not a whole pickle|was not loaded"):
            embeddings.read_pickle(path)
    with pytest.raises(UserError, match="there is no file"):
        embeddings.read_pickle(path.with_name("gone.pkl"))


@pytest.mark.parametrize(
    ("matrix", "captions", "message"),
    [
        ([1.0], ENTRIES, '"clip_embedding" is no matrix'),
        (numpy_matrix(kind="i4"), ENTRIES, '"clip_embedding" is no matrix of floating-point numbers'),
        (tensor(MATRIX[0]), ENTRIES, '"clip_embedding" is no matrix'),
        (None, {"a": 1}, '"captions" is no list'),
        (
            None,
            [*ENTRIES, {"caption": "A dog", "clip_embedding": 3}],
            "points to row 3, as one of another picture does",
        ),
        (None, [*ENTRIES, {**ENTRIES[1], "clip_embedding": 3}], "points to row 3, as one of another picture does"),
        (None, [{"caption": "A dog", "clip_embedding": 3}] * 2, "points to row 3, as one of another picture does"),
        (None, [*ENTRIES, {"caption": 3, "clip_embedding": 0}], "entry 5 of its captions has no text"),
        (
            None,
            [*ENTRIES, {"caption": "A cat", "clip_embedding": 5}],
            "entry 5 of its captions points to a row that is none of the 5",
        ),
        (None, [{"caption": "A cat", "clip_embedding": -1}], "points to a row that is none of the 5"),
        (None, [{"caption": "A cat", "clip_embedding": 10**5000}], "points to a row that is none of the 5"),
        (None, [{"caption": "A cat", "clip_embedding": "1"}], "a row that is no number, but of type str"),
        (None, [{**ENTRIES[0], "image_id": 10**5000}], "has an image_id of type int, no text and no number"),
        (tensor(MATRIX, stride=(1, 5)), ENTRIES, "a tensor in it does not lie in one piece"),
        (tensor(MATRIX, storage(MATRIX[:4])), ENTRIES, "a tensor in it does not lie in one piece"),
        (tensor(MATRIX, storage(MATRIX)[:-8]), ENTRIES, "is not a whole pickle"),
    ],
)
def test_what_is_wrong_is_said(write: Any, matrix: Any, captions: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        embeddings.read_pickle(write(matrix, captions))


def test_outputs_are_whole_or_not_there(write: Any, tmp_path: Path) -> None:
    path = write()
    with pytest.raises(UserError, match=r"the name has to end in \.npy"):
        embeddings.convert_pickle(path, tmp_path / "clip", tmp_path / "captions.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        embeddings.convert_pickle(path, tmp_path / "clip.npy", tmp_path / "gone" / "captions.jsonl")
    assert list(tmp_path.iterdir()) == [path]
