import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from shards import WRITERS, Sample, jpeg, keyed, number_of, sample, write_folder, write_stats, write_tar
from sources import read

from clipcap_jax.datasets import conceptual
from clipcap_jax.datasets.conceptual import conceptual_source
from clipcap_jax.datasets.prepare import prepare
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import Problem, Source
from clipcap_jax.errors import UserError


def test_both_splits_in_one_folder(tmp_path: Path) -> None:
    """As pixparse/cc3m-wds on the Hugging Face hub has them; its keys start anew in each split."""
    write_tar(tmp_path / "cc3m-train-0000.tar", keyed(0, 1))
    write_tar(tmp_path / "cc3m-train-0001.tar", keyed(5))
    write_tar(tmp_path / "cc3m-validation-00.tar", {"000000000": sample(7)})
    examples, problems = read(conceptual_source("cc3m", tmp_path))
    assert problems == []
    found = {(split, number_of(example.image or b"")): example for (split, _), example in examples.items()}
    assert found.keys() == {("train", 0), ("train", 1), ("train", 5), ("val", 7)}
    for (_, number), example in found.items():
        assert example.captions == (f"Picture {number}.",)


def test_names_in_a_tar_that_are_no_utf8(tmp_path: Path) -> None:
    """They are skipped, and do not stop what tells of them at the very end."""
    write_tar(tmp_path / "00000.tar", keyed(1, 2) | {"3\udcff": {"jpg": jpeg(3)}})
    summary = prepare(conceptual_source("cc12m", tmp_path), str(tmp_path / "data"), max_skipped=1.0)
    assert summary.images == {"train": 2}
    assert [problem.where for problem in summary.problems] == [f"{tmp_path.name}/00000.tar: 3\\udcff"]
    assert "3\\udcff" in (Path(summary.folder) / "report.html").read_text()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["cc3m-valid-0000", "cc3m-test-0000", "cc3m-0000", "00000"])
def test_a_split_is_never_guessed(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "files":  # whose names are but numbers
        name = "00000"
    write_tar(tmp_path / "cc3m-train-0000.tar", keyed(0, 1))
    WRITERS[kind](tmp_path / name, keyed(2))
    with pytest.raises(UserError, match=rf"{name}(.tar)?: is it of train or of validation"):
        conceptual_source("cc3m", tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_and_samples_that_are_lost(tmp_path: Path, kind: str) -> None:
    for shard in range(3):
        WRITERS[kind](tmp_path / f"{shard:05}", keyed(*range(10_000 * shard, 10_000 * shard + 4 - shard)))
        write_stats(tmp_path / f"{shard:05}_stats.json", 4)
    lost = tmp_path / f"00000{'.tar' if kind == 'tar' else ''}"
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    examples, problems = read(conceptual_source("cc12m", tmp_path))
    assert len(examples) == 3 + 2
    assert [problem.count for problem in problems if problem.reason == "shard missing"] == [4]
    assert sum(problem.count for problem in problems) == 4 + 1 + 2


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("val", ["val", "validation"])
def test_what_img2dataset_writes(tmp_path: Path, name: str, kind: str, val: str) -> None:
    train = [keyed(0, 3, 4), keyed(10_001, 10_000)]
    for shard, samples in enumerate(train):
        WRITERS[kind](tmp_path / "train" / f"{shard:05}", samples)
        write_stats(tmp_path / "train" / f"{shard:05}_stats.json", len(samples), dead=2 - shard, unusable=1)
        (tmp_path / "train" / f"{shard:05}.parquet").write_bytes(b"PAR1")
    WRITERS[kind](tmp_path / val / "00000", keyed(7))
    source = conceptual_source(name, tmp_path)
    examples, problems = read(source)
    assert examples.keys() == {("train", f"{n:09}") for n in (0, 3, 4, 10_000, 10_001)} | {("val", "000000007")}
    for (split, key), example in examples.items():
        number = int(key)
        folder = val if split == "val" else "train"
        path = "" if kind == "tar" else f"{folder}/{number // 10_000:05}/{number:09}.jpg"
        assert example == Example(jpeg(number), None, path, key, (f"Picture {number}.",), "")
    assert [(p.where, p.reason, p.count) for p in problems] == [
        ("train/00000_stats.json", "dead link", 2),
        ("train/00000_stats.json", "link to no picture", 1),
        ("train/00001_stats.json", "dead link", 1),
        ("train/00001_stats.json", "link to no picture", 1),
    ]
    assert {problem.reason for problem in problems} <= set(source.expected)
    assert source.notes == ["shards without a readable _stats.json, whose dead links are not counted: 1"]
    assert len(source.parts) == 3  # a shard each


def test_img2datasets_own_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", keyed(1))
    examples, _ = read(conceptual_source("cc12m", tmp_path))
    assert examples["train", "000000001"] == Example(jpeg(1), None, "", "000000001", ("Picture 1.",), "")


def write_lists(folder: Path, name: str, rows: Mapping[str, list[tuple[str, str]]]) -> None:
    """Captions and links, in the order of columns that the owners chose."""
    for split, pairs in rows.items():
        columns = [(caption, url) if name == "cc3m" else (url, caption) for caption, url in pairs]
        text = "".join(f"{first}\t{second}\n" for first, second in columns)
        (folder / conceptual._LISTS[name][split]).write_text(text)
        (folder / split).mkdir(exist_ok=True)
        (folder / split / "99999999.jpg").touch()  # no row's


def numbered(*numbers: int) -> list[tuple[str, str]]:
    return [(f"Picture {number}.", f"http://example.com/{number}.jpg") for number in numbers]


def test_every_caption_has_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original pairs training captions with the wrong pictures, twice.

    Its parse_conceptual.py writes train's embeddings behind validation's into one matrix, but counts train's rows from
    0: each training caption is given the embedding of a picture as many rows before its own as validation has. And as
    its list of links goes on growing from validation to train, validation's pictures are saved in train's folder under
    names of train's rows, so that those rows' own are never fetched. Dead links leave gaps, which move whatever is
    joined by order. Here every picture shows a number, every caption tells it, and all must agree.
    """
    monkeypatch.setattr(conceptual, "PICTURES_PER_SHARD", 7)
    train, val = range(1000, 1100), range(2000, 2020)
    alive = {"train": [i for i in range(100) if i % 3], "val": [i for i in range(20) if i % 4]}
    write_lists(tmp_path, "cc3m", {"train": numbered(*train), "val": numbered(*val)})
    for split, numbers in (("train", train), ("val", val)):
        for row in alive[split]:
            (tmp_path / split / f"{row:08}.jpg").write_bytes(jpeg(numbers[row]))
    for row in (1, 2, 5):  # what the original's download leaves in train's folder
        (tmp_path / "train" / f"{row:08}.jpg").write_bytes(jpeg(val[row]))
    source = conceptual_source("cc3m", tmp_path)
    examples, problems = read(source)
    expected = {("train", row) for row in alive["train"] if row not in (1, 2, 5)} | {("val", r) for r in alive["val"]}
    assert {(split, int(key)) for split, key in examples} == expected
    for (split, key), example in examples.items():
        number = {"train": train, "val": val}[split][int(key)]
        assert example.image is not None
        assert number_of(example.image) == number
        assert example.captions == (f"Picture {number}.",)
        assert example.image_path == f"{split}/{key}.jpg"
    assert sum(problem.count for problem in problems if problem.reason == "dead link") == 34 + 5
    intruders = [problem.where for problem in problems if problem.reason == "image in two splits"]
    assert intruders == [f"Train_GCC-training.tsv:{row + 1}" for row in (1, 2, 5)]

    for split in ("train", "val"):  # the same from tars, whose samples come in any order
        shards = {f"{row:09}": sample((train if split == "train" else val)[row]) for row in reversed(alive[split])}
        write_tar(tmp_path / split / "00000.tar", shards)
    examples, _ = read(conceptual_source("cc3m", tmp_path))
    assert {(split, int(key)) for split, key in examples} == {(s, row) for s, rows in alive.items() for row in rows}
    for (split, key), example in examples.items():
        assert example.image is not None
        assert number_of(example.image) == {"train": train, "val": val}[split][int(key)]
        assert example.captions == (f"Picture {number_of(example.image)}.",)


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
@pytest.mark.parametrize("form", ["plain", "windows", "header"])
def test_the_owners_lists(tmp_path: Path, name: str, form: str) -> None:
    write_lists(tmp_path, name, {"train": [("  a café ☕  ,", "http://example.com/0"), ("two", "http://e.com/1")]})
    path = tmp_path / conceptual._LISTS[name]["train"]
    if form == "windows":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    if form == "header":
        path.write_bytes((b"caption\turl\n" if name == "cc3m" else b"url\tcaption\n") + path.read_bytes())
    for row in (0, 1):
        (tmp_path / "train" / f"{row:08}.jpg").write_bytes(jpeg(row))
    examples, problems = read(conceptual_source(name, tmp_path))
    assert problems == []
    assert {key: (example.captions, example.image) for key, example in examples.items()} == {
        ("train", "00000000"): (("a café ☕ ,",), jpeg(0)),
        ("train", "00000001"): (("two",), jpeg(1)),
    }


def test_problems_in_lists(tmp_path: Path) -> None:
    write_lists(tmp_path, "cc3m", {"train": numbered(0, 1, 2)})
    with (tmp_path / "Train_GCC-training.tsv").open("ab") as file:
        file.write(b"a\ttab\thttp://e.com/3\nno link\n\n\xff\thttp://e.com/6\n \thttp://e.com/7\nlast\thttp://e.com/8")
    for row in range(9):
        (tmp_path / "train" / f"{row:08}.jpg").write_bytes(jpeg(row)[: 50 if row == 1 else None])
    (tmp_path / "train" / "00000000.jpg").unlink()
    source = conceptual_source("cc3m", tmp_path)
    examples, problems = read(source)
    assert [key for _, key in examples] == ["00000002", "00000008"]
    assert [(problem.where.removeprefix("Train_GCC-training.tsv:"), problem.reason) for problem in problems] == [
        ("2", "image broken"),
        ("4", "bad line"),
        ("5", "bad line"),
        ("6", "bad line"),
        ("7", "bad line"),
        ("8", "empty caption"),
        ("1", "dead link"),  # of a stretch of rows, together
    ]
    assert source.notes == [f"no validation data: none of val, validation in {tmp_path.resolve()}"]


@pytest.mark.parametrize("kind", WRITERS)
def test_problems_in_shards(tmp_path: Path, kind: str) -> None:
    samples: dict[str, Sample] = {
        "000000001": sample(1),
        "000000002": sample(2, status="failed_to_resize", error_message="image decoding error"),
        "000000003": sample(3, caption=" \n"),
        "000000004": {key: data for key, data in sample(4).items() if key != "txt"},
        "000000005": {key: data for key, data in sample(5).items() if key != "jpg"},
        "000000006": dict(sample(6)) | {"jpg": jpeg(6)[:50]},
        "000000007": dict(sample(7)) | {"json": b"[1]"},
        "000000008": dict(sample(8)) | {"txt": b"\xff"},
        "000000009": sample(9, caption="tab\tand\nline café ☕", url="\ud83d", status="success"),
        "000000010": sample(10, caption="tab\tand\nline café ☕"),
    }
    WRITERS[kind](tmp_path / "train" / "00000", samples)
    examples, problems = read(conceptual_source("cc3m", tmp_path))
    assert [(key, example.captions) for (_, key), example in examples.items()] == [
        ("000000001", ("Picture 1.",)),
        ("000000010", ("tab and line café ☕",)),
    ]
    assert [(problem.where[-1], problem.reason) for problem in problems] == [
        ("2", "download failed"),
        ("3", "empty caption"),
        ("4", "no caption"),
        ("5", "image missing"),
        ("6", "image broken"),
        ("7", "download failed"),
        ("8", "download failed"),
        ("9", "download failed"),
    ]
    assert problems[0].detail == "failed_to_resize: image decoding error"


@pytest.mark.parametrize("kind", WRITERS)
def test_validation_wins(tmp_path: Path, kind: str) -> None:
    """Links and pictures of validation's are not trained on."""
    same_link = sample(1, url="http://example.com/7.jpg")
    same_picture = dict(sample(2)) | {"jpg": jpeg(7)}
    train = keyed(0, 3) | {"000000001": same_link, "000000002": same_picture}
    WRITERS[kind](tmp_path / "train" / "00000", train)
    WRITERS[kind](tmp_path / "val" / "00000", keyed(7))
    examples, problems = read(conceptual_source("cc3m", tmp_path))
    assert examples.keys() == {("train", "000000000"), ("train", "000000003"), ("val", "000000007")}
    found = sorted((problem.where[-9:], problem.reason, problem.detail.split()[1]) for problem in problems)
    assert found == [
        ("000000001", "image in two splits", "link"),
        ("000000002", "image in two splits", "picture"),
    ]


def one_shard(folder: Path) -> tuple[list[str], list[Problem]]:
    examples, problems = read(conceptual_source("cc12m", folder))
    return [key for _, key in examples], problems


def test_keys(tmp_path: Path) -> None:
    """Twice in a shard is a problem; shards whose keys start anew are told apart."""
    write_tar(tmp_path / "00000.tar", {"a": sample(1), "b": sample(2)})
    write_tar(tmp_path / "00001.tar", {"a": sample(3)})
    with tarfile.open(tmp_path / "00001.tar", "a") as tar:
        for number, key in ((4, "b"), (5, "a")):
            for suffix, data in sample(number).items():
                info = tarfile.TarInfo(f"./{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    keys, problems = one_shard(tmp_path)
    assert keys == ["00000/a", "00000/b", "00001/a", "00001/b"]
    assert [(problem.where, problem.reason) for problem in problems] == [
        (f"{tmp_path.name}/00001.tar: a", "duplicate image_id")
    ]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)does not hold training data of cc3m. Put there:.*Train_GCC-training.tsv"):
        conceptual_source("cc3m", tmp_path)
    write_lists(tmp_path, "cc3m", {"train": numbered(0), "val": numbered(1)})
    (tmp_path / "val" / "99999999.jpg").unlink()
    with pytest.raises(UserError, match=r"val does not hold pictures such as 00000000.jpg"):
        conceptual_source("cc3m", tmp_path)
    (tmp_path / "val").rmdir()
    with pytest.raises(UserError, match=r"does not hold the pictures of Validation_GCC-1.1.0-Validation.tsv"):
        conceptual_source("cc3m", tmp_path)


def test_exchanged_files(tmp_path: Path) -> None:
    write_lists(tmp_path, "cc3m", {"train": numbered(0), "val": numbered(1, 2)})
    with pytest.raises(UserError, match="more for validation than for training"):
        conceptual_source("cc3m", tmp_path)
    (tmp_path / "Train_GCC-training.tsv").write_text("http://example.com/0.jpg\tPicture 0.\n")
    with pytest.raises(UserError, match=r"Train_GCC-training.tsv:1: a link where the caption should be"):
        conceptual_source("cc3m", tmp_path)


def test_shards_in_both_formats(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "00000.tar", keyed(1))
    write_folder(tmp_path / "train" / "00000", keyed(1))
    with pytest.raises(UserError, match=r"both as .tar and as folders"):
        conceptual_source("cc3m", tmp_path)


def test_parts_are_light(tmp_path: Path) -> None:
    write_lists(tmp_path, "cc3m", {"train": numbered(*range(5000)), "val": numbered(*range(5000, 7000))})
    source: Source = conceptual_source("cc3m", tmp_path)
    assert [part.split for part in source.parts] == ["train"] * 5 + ["val"] * 2
    assert all(len(repr(part)) < 3000 for part in source.parts)


def test_other_files_are_another_origin(tmp_path: Path) -> None:
    """Files are told by their names, sizes and counts: they are too large to be read for that."""
    write_tar(tmp_path / "train" / "00000.tar", keyed(0, 1))
    write_folder(tmp_path / "val" / "00000", keyed(2))
    write_lists(tmp_path, "cc12m", {"train": numbered(0, 1)})

    def origins() -> list[str]:
        return [conceptual_source("cc12m", folder).origin["files"] for folder in (tmp_path, listed)]

    listed = tmp_path / "listed"
    listed.mkdir()
    write_lists(listed, "cc12m", {"train": numbered(0, 1)})
    known = [origins()]
    assert origins() == known[0]
    for change, where in (
        (lambda: write_tar(tmp_path / "train" / "00000.tar", keyed(*range(9))), 0),
        (lambda: write_tar(tmp_path / "train" / "00001.tar", keyed(10)), 0),
        (lambda: write_stats(tmp_path / "train" / "00001_stats.json", 1), 0),
        (lambda: write_stats(tmp_path / "train" / "00001_stats.json", 1, dead=1), 0),
        (lambda: (tmp_path / "val" / "00000" / "000000003.jpg").write_bytes(jpeg(3)), 0),
        (lambda: (tmp_path / "val" / "00000").rename(tmp_path / "val" / "00001"), 0),
        (lambda: (listed / "train" / "00000000.jpg").write_bytes(jpeg(0)), 1),
        (lambda: (listed / "cc12m.tsv").write_text("http://example.com/0.jpg\tPicture 0.\n"), 1),
    ):
        change()
        found = origins()
        assert found[where] not in [before[where] for before in known]
        assert found[1 - where] == known[-1][1 - where]
        known.append(found)
