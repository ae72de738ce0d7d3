import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from clipcap_jax import datasets
from clipcap_jax.datasets import Example, RecordsSource, Summary, open_split, prepare_records, source
from clipcap_jax.datasets.shards import Writer
from clipcap_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photos, their captions in `c.jsonl`, and embeddings in `e.npy` in the same order."""
    (tmp_path / "photos").mkdir()
    records = []
    for index, split in enumerate(["train", "train", "val", "test"]):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / "photos" / f"{index}.jpg")
        captions = [f"Photo {index}.", f"The photo with number {index}."]
        records.append({"image": f"{index}.jpg", "captions": captions, "split": split, "domain": f"d{index}"})
    write_lines(tmp_path / "c.jsonl", records)
    np.save(tmp_path / "e.npy", embeddings())
    return tmp_path


def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_lines(folder: Path, *changes: dict[str, Any]) -> None:
    """Changes the first records of the captions file."""
    records = [json.loads(line) for line in (folder / "c.jsonl").read_text().splitlines()]
    for record, change in zip(records, changes, strict=False):
        record |= change
    write_lines(folder / "c.jsonl", records)


def prepare(folder: Path, max_skipped: float = 0.01, **changes: Any) -> Summary:
    """From the photos if nothing else is said."""
    paths = {"captions": str(folder / "c.jsonl"), "images": str(folder / "photos")}
    return prepare_records(RecordsSource(**{"name": "mine"} | paths | changes), str(folder / "data"), max_skipped)


def read(folder: Path, name: str = "mine", splits: tuple[str, ...] = ("train", "val", "test")) -> dict[str, Example]:
    data_dir = str(folder / "data")
    return {example.image_id: example for split in splits for example in open_split(f"records/{name}", split, data_dir)}


def test_photos(folder: Path) -> None:
    summary = prepare(folder)
    assert summary.images == {"train": 2, "val": 1, "test": 1}
    assert summary.captions == {"train": 4, "val": 2, "test": 2}
    assert (summary.skipped, summary.notes, summary.already_prepared) == ({}, (), False)
    for index in range(4):
        example = read(folder)[str(index)]
        path = folder / "photos" / f"{index}.jpg"
        assert example.image == path.read_bytes()
        assert example.image_path == path.name
        assert example.captions == (f"Photo {index}.", f"The photo with number {index}.")
        assert example.domain == f"d{index}"
        assert example.embedding is None
    assert {example.image_id for example in open_split("records/mine", "val", str(folder / "data"))} == {"2"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_embeddings_in_the_order_of_the_file(folder: Path, dtype: Any) -> None:
    matrix = embeddings().astype(dtype)
    np.save(folder / "e.npy", matrix)
    prepare(folder, images=None, embeddings=str(folder / "e.npy"), encoder="ViT-B/32")
    split = open_split("records/mine", "train", str(folder / "data"))
    assert (split.encoder, split.embedding_width, split.has_images) == ("ViT-B/32", 5, False)
    for index in range(4):
        example = read(folder)[str(index)]
        assert (example.image, example.image_path) == (None, "")
        assert example.embedding is not None
        np.testing.assert_array_equal(example.embedding, matrix[index].astype(np.float16))


def test_embeddings_by_row_and_photos_beside_them(folder: Path) -> None:
    rows = [2, 5, 0, 3]
    matrix = np.random.default_rng(1).normal(size=(6, 3))
    np.save(folder / "e.npy", matrix)
    change_lines(folder, *({"embedding_row": row} for row in rows))
    summary = prepare(folder, embeddings=str(folder / "e.npy"))
    assert summary.notes == (
        f"rows of {folder}/e.npy that no picture uses: 2",
        "what made the embeddings is not named (--encoder): those of any other encoder pass for them",
    )
    prepare(folder, name="both", embeddings=str(folder / "e.npy"), store_images=True)
    for index, row in enumerate(rows):
        without, both = read(folder)[str(index)], read(folder, "both")[str(index)]
        path = folder / "photos" / f"{index}.jpg"
        assert without.image is None
        assert both.image == path.read_bytes()
        for example in (without, both):
            assert example.image_path == path.name
            assert example.embedding is not None
            np.testing.assert_array_equal(example.embedding, matrix[row].astype(np.float16))


def jpeg(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ([{}, {"image": "none.jpg"}], "image missing", "photos/none.jpg"),
        ([{}, {"image": "broken.jpg"}], "image broken", "photos/broken.jpg: The image is truncated or broken"),
        ([{}, {"image": "page.jpg"}], "image broken", "photos/page.jpg: Not an image"),
        ([{}, {"image": "."}], "image unreadable", "not a file, but a folder"),
        ([{}, {"image": "../secret.jpg"}], "image outside the folder", "../secret.jpg"),
        ([{}, {"image": "links/../secret.jpg"}], "image outside the folder", "links/../secret.jpg"),
        ([{}, {"image": "/dev/zero"}], "image outside the folder", "/dev/zero"),
        ([{}, {"image": "pipe.jpg"}], "image unreadable", "a pipe or a device"),
        ([{}, {"image": "zero.jpg"}], "image unreadable", "a pipe or a device"),
        ([{}, {"image": "a\0b"}], "image unreadable", "null"),
        ([{}, {"captions": []}], "no caption", "image_id 1"),
        ([{}, {"image_id": "other", "image": "./0.jpg"}], "image under two ids", "as 0 in c.jsonl:1"),
        ([{}, {"image": "0.jpg"}], "duplicate image_id", "as in c.jsonl:1"),
    ],
)
def test_problems_with_photos(folder: Path, changes: list[Any], reason: str, detail: str) -> None:
    (folder / "photos" / "broken.jpg").write_bytes(jpeg()[:-500])
    (folder / "photos" / "page.jpg").write_bytes(b"<html>")
    (folder / "secret.jpg").write_bytes(jpeg())
    (folder / "photos" / "links").symlink_to(folder / "data")
    (folder / "photos" / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "photos" / "pipe.jpg")
    change_lines(folder, *changes)
    with pytest.raises(
        UserError, match=rf"1 problems in \d records, more than --max-skipped=0.01 allows \({reason} 1\)"
    ):
        prepare(folder)
    with pytest.raises(UserError, match="not prepared"):
        read(folder)

    (problem,) = prepare(folder, max_skipped=0.25).problems
    assert (problem.where, problem.reason) == ("c.jsonl:2", reason)
    assert detail in problem.detail
    assert set(read(folder)) == {"0", "2", "3"}


def test_links_in_the_folder_are_followed(folder: Path) -> None:
    """They are the user's own, and what the hub downloads is full of them."""
    (folder / "photos" / "1.jpg").rename(folder / "blob")
    (folder / "photos" / "1.jpg").symlink_to("../blob")
    assert prepare(folder).problems == ()
    assert read(folder)["1"].image == (folder / "blob").read_bytes()


def test_a_picture_in_two_splits_stays_out_of_train(folder: Path) -> None:
    change_lines(folder, {}, {"image_id": "other", "image": "0.jpg", "split": "test"})
    (problem,) = prepare(folder, max_skipped=0.25).problems
    assert str(problem) == "c.jsonl:1: image in two splits: 0 is in 'train', but in 'test' as other in c.jsonl:2"
    assert set(read(folder, splits=("val", "test"))) == {"other", "2", "3"}


def test_two_files_of_one_stem_are_two_pictures(folder: Path) -> None:
    Image.new("RGB", (8, 6), (9, 9, 9)).save(folder / "photos" / "0.png")
    change_lines(folder, {}, {"image": "0.png"})
    assert prepare(folder).problems == ()
    examples = read(folder)
    assert set(examples) == {"0.jpg", "0.png", "2", "3"}
    assert examples["0.png"].image == (folder / "photos" / "0.png").read_bytes()


def test_near_misses_are_told_before_any_work(folder: Path) -> None:
    for path in (folder / "photos").iterdir():
        path.rename(path.with_suffix(".JPG"))
    with pytest.raises(UserError, match=r"4 problems in 4 records.*\n.*0.jpg is not there, but 0.JPG is") as error:
        prepare(folder)
    assert len(str(error.value).splitlines()) == 2


def test_the_originals_list_of_captions(folder: Path) -> None:
    """Its pictures have ids alone."""
    captions = [{"image_id": str(index), "id": index, "caption": f"Photo {index}."} for index in range(4)]
    (folder / "train_caption.json").write_text(json.dumps(captions))
    summary = prepare(folder, captions=str(folder / "train_caption.json"), split="train")
    assert summary.problems == ()
    assert {example.image_path for example in read(folder, splits=("train",)).values()} == {
        f"{index}.jpg" for index in range(4)
    }


def test_fields_by_option(folder: Path) -> None:
    (folder / "c.csv").write_text("photo,alt,caption\n" + "".join(f"{i}.jpg,Photo {i}.,no\n" for i in range(4)))
    with pytest.raises(UserError, match="It has: photo, alt, caption"):
        prepare(folder, captions=str(folder / "c.csv"))
    options: dict[str, Any] = {"captions": str(folder / "c.csv"), "image_field": "photo", "split": "val"}
    prepare(folder, **options, caption_field="alt")
    assert read(folder, splits=("val",))["1"].captions == ("Photo 1.",)
    with pytest.raises(UserError, match="caption_field was alt, is now caption"):
        prepare(folder, **options, caption_field="caption")


def test_a_split_called_all_is_refused_before_any_work(folder: Path) -> None:
    change_lines(folder, {}, {"split": "all"})
    with pytest.raises(UserError, match=r"c.jsonl:2: no split can be called 'all'"):
        prepare(folder)
    assert not (folder / "data").exists()


def test_rows_do_not_move_up(folder: Path) -> None:
    """What has no row of its own is refused, rather than that all pictures behind it get another's."""
    np.save(folder / "e.npy", embeddings())
    change_lines(folder, {}, {"captions": [" "]})
    prepare(folder, 0.25, images=None, embeddings=str(folder / "e.npy"))
    np.testing.assert_array_equal(read(folder)["2"].embedding, embeddings()[2].astype(np.float16))
    change_lines(folder, {}, {"image": "0.jpg", "captions": ["A dog."]})
    with pytest.raises(UserError, match=r"no embedding_row, and has lines.*\n  c.jsonl:2: duplicate image_id"):
        prepare(folder, 1, name="other", images=None, embeddings=str(folder / "e.npy"))


def with_row(row: int, value: float) -> np.ndarray:
    matrix = embeddings()
    matrix[row, -1] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "rows", "reason", "detail"),
    [
        (with_row(1, np.nan), None, "embedding not finite", "row 1"),
        (with_row(1, -np.inf), None, "embedding not finite", "row 1"),
        (with_row(1, 1e5), None, "embedding too large", "row 1"),
        (embeddings() * [[1], [0], [1], [1]], None, "embedding all zero", "row 1"),
        (embeddings(), [0, 4, 1, 2], "embedding_row out of range", "row 4 of 4"),
        (embeddings(), [0, -1, 1, 2], "embedding_row out of range", "row -1 of 4"),
        (embeddings(), [0, 0, 1, 2], "embedding_row used twice", "row 0 belongs to 0 in c.jsonl:1"),
        (embeddings(), [0, None, 1, 2], "no embedding_row", "1 names none"),
    ],
)
def test_problems_with_embeddings(folder: Path, matrix: np.ndarray, rows: Any, reason: str, detail: str) -> None:
    np.save(folder / "e.npy", matrix)
    if rows:
        change_lines(folder, *({"embedding_row": row} for row in rows))
    with pytest.raises(UserError, match=rf"\({reason} 1\)"):
        prepare(folder, images=None, embeddings=str(folder / "e.npy"))
    (problem,) = prepare(folder, images=None, embeddings=str(folder / "e.npy"), max_skipped=0.25).problems
    assert (problem.where, problem.reason) == ("c.jsonl:2", reason)
    assert detail in problem.detail
    kept = read(folder)
    assert set(kept) == {"0", "2", "3"}
    expected = matrix[rows[2] if rows else 2].astype(np.float16)
    np.testing.assert_array_equal(kept["2"].embedding, expected)  # the others have not moved up


def test_rows_are_never_guessed(folder: Path) -> None:
    np.save(folder / "e.npy", embeddings()[:3])
    with pytest.raises(UserError, match=r"names 4 pictures, but .*e.npy has 3 rows"):
        prepare(folder, images=None, embeddings=str(folder / "e.npy"), max_skipped=1)
    np.save(folder / "e.npy", embeddings())
    change_lines(folder, {}, {"image": ""})
    with pytest.raises(
        UserError, match=r"no embedding_row, and has lines that cannot be used.*\n  c.jsonl:2: missing field"
    ):
        prepare(folder, images=None, embeddings=str(folder / "e.npy"), max_skipped=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "needs images, embeddings or both"),
        ({"images": "/no/such/folder"}, "image folder /no/such/folder does not exist"),
        ({"captions": "/"}, "captions file / is a folder"),
        ({"images": __file__}, "test_records.py is no folder"),
        ({"captions": "/no/such/file.jsonl"}, "captions file /no/such/file.jsonl does not exist"),
        ({"embeddings": "/no/such/file.npy"}, "embeddings file /no/such/file.npy does not exist"),
        ({"embeddings": __file__}, "is not a matrix saved by numpy.save"),
        ({"name": "a/b"}, "name 'a/b' must be made of"),
        ({"split": {"train": 0.5}}, "add up to 1"),
        ({"split": {"train": 1.5, "val": -0.5}}, "at least 0"),
        ({"split": "train set"}, "must be a word"),
        ({"split": "all"}, "--split: no split can be called 'all'"),
        ({"encoder": "ViT-B/32"}, "set embeddings"),
        ({"images": None, "embeddings": "e.npy", "store_images": True}, "set images"),
    ],
)
def test_sources_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(folder, **changes)


@pytest.mark.parametrize("matrix", [np.zeros(4), np.zeros((4, 2), np.int64), np.zeros((4, 2, 2)), np.array(["a", "b"])])
def test_not_a_matrix_of_embeddings(folder: Path, matrix: np.ndarray) -> None:
    np.save(folder / "e.npy", matrix)
    with pytest.raises(UserError, match="must hold one matrix of floating-point numbers"):
        prepare(folder, embeddings=str(folder / "e.npy"))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"}", b" "), (b"(28, 5)", b"(None,)"), (b"(28, 5)", b"28     "), (b"'<f4'", b"'<f'["), (b"{", b"[")],
)
def test_damaged_headers_of_embeddings(folder: Path, old: bytes, new: bytes) -> None:
    """NumPy raises TypeError, TokenError, SyntaxError and others."""
    np.save(folder / "e.npy", np.ones((28, 5), np.float32))
    data = (folder / "e.npy").read_bytes()
    assert old in data
    (folder / "e.npy").write_bytes(data.replace(old, new))
    with pytest.raises(UserError, match="is not a matrix saved by numpy"):
        prepare(folder, embeddings=str(folder / "e.npy"))


def test_no_captions_at_all(folder: Path) -> None:
    (folder / "c.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no captions"):
        prepare(folder)


def test_many_problems_are_counted_and_the_first_are_listed(folder: Path) -> None:
    write_lines(folder / "c.jsonl", [{"image": f"no{index}.jpg", "caption": "A dog."} for index in range(13)])
    with pytest.raises(UserError, match=r"13 problems.*\(image missing 13\)") as error:
        prepare(folder)
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  c.jsonl:1: image missing: ")
    assert lines[10].startswith("  c.jsonl:10: image missing: ")
    assert lines[11] == "  and 3 more"


def test_the_summary_shows_everything(folder: Path) -> None:
    change_lines(folder, {"image": "no.jpg", "licence": "CC"}, {"captions": ["", "Photo 1."]})
    summary = prepare(folder, max_skipped=0.5)
    assert summary.skipped == {"empty caption": 1, "image missing": 1}
    assert summary.captions == {"train": 1, "val": 2, "test": 2}
    console = Console(width=300, file=io.StringIO())
    console.print(summary)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (
        f"records/mine is prepared: {folder}/data/records/mine/1.0.0",
        "skipped 1: empty caption",
        "skipped 1: image missing",
        f"c.jsonl:1: image missing: {folder}/photos/no.jpg",
        "c.jsonl:2: empty caption: image_id 1",
        f"note: fields of {folder}/c.jsonl that were not used: licence",
    ):
        assert text in shown
    again = prepare(folder, max_skipped=0.5)
    assert again.already_prepared
    assert (again.images, again.captions, again.problems) == (summary.images, summary.captions, summary.problems)
    rich.print(again)


def test_where_files_lie_is_no_part_of_it(folder: Path) -> None:
    """Photos that were moved, a captions file of another name: nothing to do, and said."""
    first = prepare(folder)
    (folder / "photos").rename(folder / "moved")
    (folder / "c.jsonl").rename(folder / "other.jsonl")
    again = prepare(folder, captions=str(folder / "other.jsonl"), images=str(folder / "moved"))
    assert again.already_prepared
    assert again.notes == (
        f"its pictures were read from {folder}/photos; those that lie elsewhere now were not looked at",
    )
    fingerprint = open_split("records/mine", "train", first.folder.partition("/records")[0]).fingerprint
    shutil.rmtree(first.folder)
    anew = prepare(folder, captions=str(folder / "other.jsonl"), images=str(folder / "moved"))
    assert not anew.already_prepared
    assert open_split("records/mine", "train", first.folder.partition("/records")[0]).fingerprint == fingerprint


def test_prepared_from_something_else(folder: Path) -> None:
    prepare(folder)
    with pytest.raises(UserError, match=r"from something else: store_images was True, is now False; .*Delete"):
        prepare(folder, store_images=False, split="train")
    change_lines(folder, {"domain": "x"})
    with pytest.raises(UserError, match=r"captions was SHA-256 \w+, is now SHA-256 \w+"):
        prepare(folder)


def test_shares_of_the_splits(folder: Path) -> None:
    write_lines(folder / "c.jsonl", [{"image_id": f"{index}", "caption": "A dog."} for index in range(2000)])
    np.save(folder / "e.npy", np.ones((2000, 1)))
    shares = {"train": 0.7, "extra": 0.2, "test": 0.1}
    summary = prepare(folder, images=None, embeddings=str(folder / "e.npy"), encoder="mine", split=shares)
    assert list(summary.images) == ["train", "test", "extra"]
    for split, share in shares.items():
        assert summary.images[split] == pytest.approx(2000 * share, abs=80)
    assert summary.notes == (
        "2,000 pictures had no split and were given one: train 70%, extra 20%, test 10%",
        "splits that are none of train, val and test: extra",
    )
    for split in shares:  # each picture's by its id alone
        for image_id in read(folder, splits=(split,)):
            draw = int(hashlib.sha256(image_id.encode()).hexdigest()[:16], 16) / 16**16
            assert split == ("train" if draw < 0.7 else "extra" if draw < 0.9 else "test")


def test_shares_of_a_few_pictures(folder: Path) -> None:
    """Chance alone would leave val and test empty: they get what was drawn last, and keep nothing that train needs."""
    draws = {name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16 for name in map(str, range(6))}
    assert max(draws.values()) < 0.98
    write_lines(folder / "c.jsonl", [{"image_id": name, "captions": ["A dog.", "A cat."]} for name in draws])
    np.save(folder / "e.npy", np.ones((6, 1)))
    shares = {"train": 0.98, "val": 0.01, "test": 0.01}
    options: dict[str, Any] = {"images": None, "embeddings": str(folder / "e.npy"), "split": shares}
    summary = prepare(folder, **options)
    assert summary.notes[-1] == "splits that the shares left empty and that were given a picture: val, test"
    *_, before, last = sorted(draws, key=draws.__getitem__)
    assert [*read(folder, splits=("val",))] == [last]
    assert [*read(folder, splits=("test",))] == [before]
    assert {*read(folder, splits=("train",))} == {*draws} - {last, before}

    write_lines(folder / "c.jsonl", [{"image_id": name, "caption": "A dog."} for name in "01"])
    np.save(folder / "e.npy", np.ones((2, 1)))
    message = "2 pictures cannot be shared among train, val, test. Give more, or put all in one split: --split train"
    with pytest.raises(UserError, match=message):
        prepare(folder, name="two", **options)
    assert prepare(folder, name="two", **options | {"split": {"train": 0.98, "val": 0.02, "test": 0}}).images == {
        "train": 1,
        "val": 1,
    }
    # The splits that a file names are left as they are.
    write_lines(folder / "c.jsonl", [{"image_id": name, "caption": "A dog.", "split": "train"} for name in "01"])
    assert prepare(folder, name="named", **options).images == {"train": 2}


def test_one_split_for_all_that_name_none(folder: Path) -> None:
    change_lines(folder, {"split": None}, {"split": ""})
    summary = prepare(folder, split="test")
    assert summary.images == {"val": 1, "test": 3}


def test_tfds_itself_reads_the_result(folder: Path) -> None:
    prepare(folder)
    source = tfds.data_source(
        "records/mine", split="val", data_dir=folder / "data", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert source[0]["captions"] == [b"Photo 2.", b"The photo with number 2."]


def test_what_was_not_finished_is_not_there(folder: Path) -> None:
    """The process is killed while it writes; the next one goes on."""
    script = f"""
import os, signal
from clipcap_jax.datasets import RecordsSource, prepare_records, source
read_bytes = source.Path.read_bytes
def killed(path):
    if path.name == "2.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return read_bytes(path)
source.Path.read_bytes = killed
os.chdir({str(folder)!r})
prepare_records(RecordsSource("mine", "c.jsonl", "photos"), "data")
"""
    code = str(Path(datasets.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": code}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.is_file() for path in (folder / "data").rglob("*"))  # it had begun
    with pytest.raises(UserError, match="not prepared"):
        open_split("records/mine", "train", str(folder / "data"))
    assert not prepare(folder).already_prepared
    assert len(read(folder)) == 4


def test_pictures_that_come_and_go_between_a_stop_and_the_next_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They move others from shard to shard: none is lost, and none is there twice."""
    monkeypatch.setattr(source, "PICTURES_PER_SHARD", 2)
    names = [f"{i}.jpg" for i in range(10)]  # five shards, and five without one of them
    for i, name in enumerate(names):
        Image.new("RGB", (8, 6), (i, 1, 0)).save(folder / "photos" / name)
    write_lines(folder / "c.jsonl", [{"image": name, "caption": f"Of {name}.", "split": "train"} for name in names])
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, index, part: stop() if index == 3 else write(self, index, part))
    with pytest.raises(UserError, match="could not be prepared"):
        prepare(folder, max_skipped=0.5)
    monkeypatch.undo()
    monkeypatch.setattr(source, "PICTURES_PER_SHARD", 2)
    (folder / "photos" / "4.jpg").rename(folder / "photos" / "4.JPG")  # a near miss, which is left out
    assert prepare(folder, max_skipped=0.5).images == {"train": 9}
    assert {*read(folder, splits=("train",))} == {"0", "1", "2", "3", "5", "6", "7", "8", "9"}


def stop() -> None:
    raise OSError("no more")


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "data").write_text("a file")
    with pytest.raises(UserError, match=r"records/mine could not be prepared in .*data"):
        prepare(folder)


def test_flickr8k_both_ways(shared: Path, tmp_path: Path) -> None:
    flickr = shared / "data" / "flickr8k"
    with tarfile.open(flickr / "images_128.tar") as tar:
        tar.extractall(tmp_path / "photos", filter="data")
    source = RecordsSource(
        name="flickr8k",
        captions=str(flickr / "captions.jsonl"),
        images=str(tmp_path / "photos"),
        embeddings=str(flickr / "efficientnet_lite0_embeddings.npy"),
        encoder="efficientnet-lite0",
        store_images=True,
    )
    summary = prepare_records(source, str(tmp_path))
    assert summary.images == {"train": 6000, "val": 1000, "test": 1000}
    assert summary.captions == {"train": 30_000, "val": 5000, "test": 5000}
    assert summary.problems == ()
    matrix = np.load(flickr / "efficientnet_lite0_embeddings.npy")
    lines = (flickr / "captions.jsonl").read_text().splitlines()
    records = {record["image_id"]: record for record in map(json.loads, lines)}
    for split in summary.images:
        for example in open_split("records/flickr8k", split, str(tmp_path)):
            record = records.pop(example.image_id)
            path = tmp_path / "photos" / record["image"]
            assert record["split"] == split
            assert example.captions == tuple(record["captions"])
            assert (example.image, example.image_path) == (path.read_bytes(), path.name)
            assert example.embedding is not None
            assert example.embedding.tobytes() == matrix[record["embedding_row"]].tobytes()
    assert not records


def test_coco_photos(shared: Path, tmp_path: Path) -> None:
    coco = shared / "data" / "coco_photos"
    source = RecordsSource("coco", str(coco / "captions.json"), images=str(coco / "images"), split="test")
    assert prepare_records(source, str(tmp_path)).images == {"test": 100}
    content = json.loads((coco / "captions.json").read_text())
    names = {str(image["id"]): image["file_name"] for image in content["images"]}
    for example in open_split("records/coco", "test", str(tmp_path)):
        captions = [a["caption"] for a in content["annotations"] if str(a["image_id"]) == example.image_id]
        assert example.captions == tuple(" ".join(caption.split()) for caption in captions)
        assert example.image == (coco / "images" / names.pop(example.image_id)).read_bytes()
    assert not names


@given(st.lists(st.booleans(), min_size=1, max_size=4), st.floats(0, 1))
def test_max_skipped_is_the_limit(
    tmp_path_factory: pytest.TempPathFactory, good: list[bool], max_skipped: float
) -> None:
    folder = tmp_path_factory.mktemp("limit")
    write_lines(folder / "c.jsonl", [{"image_id": f"{i}", "caption": "A." if ok else ""} for i, ok in enumerate(good)])
    np.save(folder / "e.npy", np.ones((len(good), 1)))
    problems = good.count(False)
    total = len(good)
    try:
        summary = prepare(folder, max_skipped, images=None, embeddings=str(folder / "e.npy"), split="test")
    except UserError:
        assert problems > max_skipped * total or not any(good)
    else:
        assert problems <= max_skipped * total
        assert summary.images == {"test": sum(good)}


def test_a_wrong_folder_is_forgotten(folder: Path) -> None:
    with pytest.raises(UserError, match=r"4 problems in 4 records.*image missing"):
        prepare(folder, images=str(folder))
    assert prepare(folder).images == {"train": 2, "val": 1, "test": 1}
