import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import listed

from clipcap_jax.datasets import Example, open_split, prepare, prepare_shapes, schema, shapes
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import batches as data_lib
from clipcap_jax.inputs.batches import CaptionData, make_pairs
from clipcap_jax.inputs.columns import ArrayWriter, Ragged, TextWriter, load, open_columns
from clipcap_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a dog"], 260)
CAPTIONS = [("a dog.", "ein Hündchen 🐕"), (), ('it\'s\na "dog"', "", "a dog."), (" b ",), ("日本語",), ()]


EMBEDDINGS = np.arange(18, dtype=np.float16).reshape(6, 3) + 1


def write(
    data_dir: Path, captions: Sequence[tuple[str, ...]] = CAPTIONS, embeddings: np.ndarray | None = EMBEDDINGS
) -> Path:
    """Prepare the data set "given" of pictures "ä0", "ä1", ..., or their embeddings; returns its folder."""
    examples = [
        Example(
            image=b"no picture" if embeddings is None else None,
            embedding=None if embeddings is None else embeddings[i],
            image_path=f"/ö/{i}.jpg",
            image_id=f"ä{i}",
            captions=some,
            domain=f"d{i}",
        )
        for i, some in enumerate(captions)
    ]
    prepare.prepare(listed("given", "val", examples), str(data_dir))
    return data_dir / "given" / "1.0.0"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where columns go that cannot lie beside the data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clipcap_jax" / "columns"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def read(tmp_path: Path, split: str = "val") -> CaptionData:
    return CaptionData(open_split("given", split, str(tmp_path)), None)


def finished(home: Path) -> list[str]:
    """The folders that have got their names."""
    return sorted(path.name for path in home.iterdir() if not path.name.startswith("."))


def assert_whole(data: CaptionData, examples: Sequence[int] = range(6)) -> None:
    """The columns hold what the records do, in the order of these."""
    split = data._split
    order = [int(example.image_id[1:]) for example in split]
    assert sorted(order) == sorted(examples)
    assert list(data.image_ids) == [f"ä{i}" for i in order]
    assert list(data.image_paths) == [f"/ö/{i}.jpg" for i in order]
    assert list(data.domains) == [f"d{i}" for i in order]
    assert list(data.captions) == [CAPTIONS[i] for i in order]
    np.testing.assert_array_equal(data.inputs(range(len(data))), EMBEDDINGS[order])


def test_columns_hold_what_was_prepared(tmp_path: Path, folder: Path) -> None:
    assert_whole(read(tmp_path))
    (name,) = finished(folder / "columns")
    assert name.startswith("val-")
    assert not (tmp_path / "cache").exists()


def test_the_second_opening_reads_no_records(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(tmp_path)
    first.pairs(TOKENIZER, 9)
    monkeypatch.setattr(schema, "ArrayRecordDataSource", None)
    monkeypatch.setattr(TOKENIZER, "encode", None)
    second = read(tmp_path)
    assert list(second.captions) == list(first.captions)
    assert second.image(0) is None
    assert len(second.pairs(TOKENIZER, 9)) == 7
    with pytest.raises(TypeError):  # the other tokens are not there
        second.pairs(TOKENIZER, 8)


@pytest.mark.parametrize("part", ["val[:2]", "val[2:5]", "val[-1:]", "val[50%:]"])
def test_a_part_of_a_split(tmp_path: Path, folder: Path, part: str) -> None:
    whole, data = read(tmp_path), read(tmp_path, part)
    start, stop = data._split.start, data._split.stop
    assert 0 < len(data) == stop - start < 6
    assert list(data.captions) == list(whole.captions)[start:stop]
    assert list(data.image_ids) == list(whole.image_ids)[start:stop]
    np.testing.assert_array_equal(data.inputs(range(len(data))), whole.inputs(range(start, stop)))
    assert [example.image_id for example in data._split] == list(data.image_ids)
    pairs, expected = data.pairs(TOKENIZER, 8), make_pairs(data.captions, TOKENIZER, 8)
    assert pairs.cut == expected.cut
    for found, other in ((pairs.examples, expected.examples), (pairs.lengths, expected.lengths)):
        np.testing.assert_array_equal(found, other, strict=True)
    rows = np.arange(len(pairs))
    np.testing.assert_array_equal(pairs.padded(rows, 8), expected.padded(rows, 8))
    assert len(finished(folder / "columns")) == 2


def test_several_parts_or_none(tmp_path: Path, folder: Path) -> None:
    for part, message in (("val[:2]+val[3:]", "it takes one"), ("val[3:3]", "it holds no examples")):
        with pytest.raises(UserError, match=message):
            read(tmp_path, part)


def test_pictures_without_embeddings(tmp_path: Path) -> None:
    folder = write(tmp_path, embeddings=None)
    data = CaptionData(open_split("given", "val", str(tmp_path)), 16)
    assert sorted(data.captions) == sorted(CAPTIONS)
    assert data.image(3) == b"no picture"
    assert not list(folder.glob("columns/*/embeddings.npy"))


@pytest.mark.parametrize("captions", [[()], [(), ("",)], [("",)]])
@pytest.mark.parametrize("targets", ["all", "original"])
def test_hardly_any_captions(tmp_path: Path, captions: list[tuple[str, ...]], targets: Any) -> None:
    write(tmp_path, captions, EMBEDDINGS[: len(captions)])
    data = read(tmp_path)
    assert sorted(data.captions) == sorted(captions)
    pairs = data.pairs(TOKENIZER, 5, targets)
    assert pairs.lengths.tolist() == sum(map(len, captions)) * [1 if targets == "all" else 0]
    assert pairs.padded(np.arange(len(pairs)), 3).tolist() == len(pairs) * [3 * [TOKENIZER.end_id]]


def test_tokens_depend_on_all_that_makes_them(tmp_path: Path, folder: Path) -> None:
    data = read(tmp_path)
    other = Tokenizer.train(["ein Hündchen"], 270)
    for tokenizer, max_tokens, targets in ((TOKENIZER, 20, "all"), (TOKENIZER, 4, "all"), (other, 20, "original")):
        for _ in range(2):
            pairs = data.pairs(tokenizer, max_tokens, targets)  # type: ignore[arg-type]
            expected = make_pairs(data.captions, tokenizer, max_tokens, targets)  # type: ignore[arg-type]
            assert pairs.cut == expected.cut
            assert pairs.tokens.dtype == np.uint16
            rows = np.arange(len(pairs))
            np.testing.assert_array_equal(pairs.padded(rows, 20), expected.padded(rows, 20))
    assert len(finished(folder / "columns")) == 1 + 3


def test_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "size", 2**16 + 1)
    assert make_pairs(CAPTIONS, TOKENIZER, 9).tokens.dtype == np.int32


@given(st.lists(st.lists(st.text(max_size=9), max_size=3).map(tuple), max_size=9), st.integers(1, 9))
def test_tokens_equal_those_of_each_caption(captions: list[tuple[str, ...]], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_lib, "_TOKENISED_AT_ONCE", at_once)
        pairs = make_pairs(captions, TOKENIZER, 7)
    expected = [[*TOKENIZER.encode([text])[0], TOKENIZER.end_id] for texts in captions for text in texts]
    assert pairs.examples.tolist() == [i for i, texts in enumerate(captions) for _ in texts]
    assert pairs.cut == sum(len(ids) > 7 for ids in expected)
    for ids, row in zip(expected, pairs.padded(np.arange(len(pairs)), 7).tolist(), strict=True):
        assert row == (ids[:7] + 7 * [TOKENIZER.end_id])[:7]


def test_an_embedding_that_is_not_finite(tmp_path: Path) -> None:
    embeddings = EMBEDDINGS.copy()
    embeddings[4, 1] = np.inf
    folder = write(tmp_path, embeddings=embeddings)
    with pytest.raises(UserError, match="given/val: the embedding of 'ä4' holds NaN or infinity"):
        read(tmp_path)
    assert finished(folder / "columns") == []


def test_where_the_data_set_cannot_be_written_to(tmp_path: Path, folder: Path, home: Path) -> None:
    (folder / "columns").write_text("a file, where no folder can be made")
    assert_whole(read(tmp_path))
    assert len(finished(home)) == 1
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("nor here")
    with pytest.raises(UserError, match=r"nothing can be written to .*/columns or .*: set XDG_CACHE_HOME"):
        read(tmp_path)


def test_columns_that_an_administrator_made(
    tmp_path: Path, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read where they are; the tokens, which are ours, go to the cache."""
    read(tmp_path)
    open_path = Path.open

    def refuse(path: Path, mode: str = "r", *options: Any, **named: Any) -> Any:
        if path.parent == folder / "columns" and mode == "a":  # as root may write everywhere
            raise PermissionError(13, "Permission denied")
        return open_path(path, mode, *options, **named)

    monkeypatch.setattr(Path, "open", refuse)
    read(tmp_path).pairs(TOKENIZER, 9)
    assert len(finished(folder / "columns")) == 1
    assert len(finished(home)) == 1


def test_a_full_disk(tmp_path: Path, folder: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("needs /dev/full")
    open_path = Path.open

    def full(path: Path, *options: Any, **named: Any) -> Any:
        return open_path(Path("/dev/full") if path.name == "captions.npy" else path, *options, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"val-[\w-]+ could not be made: .*No space left on device.*make room"):
            read(tmp_path)
    assert finished(folder / "columns") == []
    assert not list((folder / "columns").glob(".*.tmp"))
    assert_whole(read(tmp_path))


def test_a_data_set_that_is_prepared_again(tmp_path: Path, folder: Path, home: Path) -> None:
    """With other content in files of the same sizes, while the columns of the first lie elsewhere."""
    (folder / "columns").write_text("a file, where no folder can be made")
    before = read(tmp_path)
    sizes = {path.name: path.stat().st_size for path in folder.glob("given-*")}
    shutil.rmtree(folder)
    write(tmp_path, embeddings=EMBEDDINGS[::-1])
    assert {path.name: path.stat().st_size for path in folder.glob("given-*")} == sizes
    (folder / "columns").write_text("a file, where no folder can be made")
    after = read(tmp_path)
    assert (before.inputs(range(6)) != after.inputs(range(6))).any()
    assert len(finished(home)) == 2


def test_a_split_that_is_older_than_the_data_set(tmp_path: Path, folder: Path) -> None:
    """Its columns are not made of the new one, nor filed under it."""
    old = open_split("given", "val", str(tmp_path))
    shutil.rmtree(folder)
    write(tmp_path, embeddings=EMBEDDINGS[::-1])
    with pytest.raises(UserError, match=r"given/1.0.0 was deleted or prepared anew"):
        open_columns(old)
    assert finished(folder / "columns") == []
    data = read(tmp_path)
    order = [int(image_id[1:]) for image_id in data.image_ids]
    np.testing.assert_array_equal(data.inputs(range(6)), EMBEDDINGS[::-1][order])


def test_a_data_set_that_is_half_copied_over_another(tmp_path: Path, folder: Path) -> None:
    """The descriptions first, as copying in the order of names does."""
    write(tmp_path / "new", embeddings=EMBEDDINGS[::-1])
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        shutil.copy(tmp_path / "new" / "given" / "1.0.0" / name, folder / name)
    with pytest.raises(UserError, match=r"given-val\S+ cannot be read: it is not what was written"):
        read(tmp_path)


def test_prepared_anew_under_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose captions are mapped and whose pictures are read from shards, as in training from pixels: no wrong pair."""
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 10)
    prepare_shapes(str(tmp_path), {"train": 50})
    data = CaptionData(open_split("shapes", "train", str(tmp_path)), 32)
    old = {i: data.image(i) for i in range(10)}
    expected = dict(zip(data.image_ids, data.captions, strict=True))
    shutil.rmtree(tmp_path / "shapes")
    prepare_shapes(str(tmp_path), {"train": 60})
    read = 0
    for i in range(50):
        with contextlib.suppress(UserError):
            assert data.image(i) == old[i]  # a KeyError where an unopened shard gave anything
            assert data.captions[i] == expected[data.image_ids[i]]
            read += 1
    assert read == 10


def test_a_copied_data_set_brings_its_columns(tmp_path: Path, folder: Path) -> None:
    read(tmp_path).pairs(TOKENIZER, 9)
    made = finished(folder / "columns")
    shutil.copytree(tmp_path / "given", tmp_path / "copy" / "given")
    read(tmp_path / "copy").pairs(TOKENIZER, 9)
    assert finished(tmp_path / "copy" / "given" / "1.0.0" / "columns") == made


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(tmp_path: Path, folder: Path, seed: int) -> None:
    """At random places of every file that is read: an error that names the file, or the same examples."""
    random = np.random.default_rng(seed)
    read(tmp_path).pairs(TOKENIZER, 9)
    kinds = (".npy", ".json")
    paths = [path for path in folder.rglob("*") if path.suffix in kinds or ".array_record" in path.name]
    assert len(paths) > 15
    for path in paths:
        before = path.read_bytes()
        for place in random.integers(len(before), size=25):
            damaged = bytearray(before)
            damaged[place] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            message = ""
            try:
                data = read(tmp_path)
                data.pairs(TOKENIZER, 9)
                assert [example.image_id for example in open_split("given", "val", str(tmp_path))] == data.image_ids[:]
                assert_whole(data)
            except UserError as error:
                message = str(error)
            assert not message or path.name in message or str(path.parent) in message
        path.write_bytes(before)


def test_shards_that_are_gone(tmp_path: Path, folder: Path) -> None:
    (shard,) = folder.glob("*.array_record*")
    shard.unlink()
    with pytest.raises(UserError, match=r"given-val\S+ cannot be read: .*No such file.*prepare the data set again"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
@pytest.mark.parametrize("name", ["embeddings", "captions", "captions_offsets", "domains"])
def test_damaged_columns(tmp_path: Path, folder: Path, name: str, damage: str) -> None:
    read(tmp_path)
    (file,) = folder.glob(f"columns/*/{name}.npy")
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"columns/val-[\w-]+/{name}.npy is damaged: .* Delete \S+; it is made again"):
        read(tmp_path)
    shutil.rmtree(file.parent)
    assert_whole(read(tmp_path))


def read_until(tmp_path: Path, examples: int) -> None:
    """Open the data set, and be killed while the columns are written."""
    parse, seen = schema._parse, 0

    def kill(record: bytes) -> schema.Example:
        nonlocal seen
        seen += 1
        if seen > examples:
            os.kill(os.getpid(), signal.SIGKILL)
        return parse(record)

    schema._parse = kill
    schema.READ_AT_ONCE = 2
    read(tmp_path)


def test_killed_while_writing(tmp_path: Path, folder: Path) -> None:
    for examples in (1, 4):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(BrokenProcessPool):
            pool.submit(read_until, tmp_path, examples).result()
        assert finished(folder / "columns") == []
        assert len(list((folder / "columns").glob(".*.tmp"))) == 1  # the one before is gone
    assert_whole(read(tmp_path))
    assert not list((folder / "columns").glob(".*.tmp"))


@pytest.mark.parametrize("at_once", [1, 4, 5])
def test_some_examples_at_a_time(tmp_path: Path, folder: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "READ_AT_ONCE", at_once)
    assert_whole(read(tmp_path))


def test_threads_at_once(tmp_path: Path, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for data in pool.map(lambda _: read(tmp_path), range(8)):
            assert_whole(data)
    assert len(finished(folder / "columns")) == 1


@given(st.lists(st.text(max_size=9), max_size=9), st.integers(0, 9))
def test_texts(items: list[str], at_once: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        with TextWriter(Path(name), "items") as writer:
            writer.extend(items[:at_once])
            writer.extend(items[at_once:])
            assert writer.count == len(items)
        values, offsets = load(Path(name), "items", "items_offsets")
    ragged = Ragged(values, offsets, lambda value: value.tobytes().decode())
    assert list(ragged) == ragged[:] == items
    assert len(ragged) == len(items)
    assert [ragged[-1 - i] for i in range(len(items))] == items[::-1]
    for start in range(len(items) + 1):
        assert list(ragged.part(start, len(items))) == items[start:]
    with pytest.raises(IndexError):
        ragged[len(items)]


@pytest.mark.parametrize("shape", [(0,), (3,), (100_000,), (0, 4), (5, 4)])
def test_arrays_row_by_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    with ArrayWriter(tmp_path / "a.npy", np.float16, *shape[1:]) as writer:
        writer.extend(rows[:1])
        writer.extend(rows[1:])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows, strict=True)
    np.testing.assert_array_equal(load(tmp_path, "a")[0], rows, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), rows, strict=True)


def test_what_is_mapped_cannot_be_written_to(tmp_path: Path, folder: Path) -> None:
    opened = open_columns(open_split("given", "val", str(tmp_path)))
    assert opened.embeddings is not None
    with pytest.raises(ValueError, match="read-only"):
        opened.embeddings[0, 0] = 1
