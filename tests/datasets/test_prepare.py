import dataclasses
import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from clipcap_jax.datasets import Example, open_split, prepare, prepare_shapes, shapes
from clipcap_jax.datasets.shards import Writer
from clipcap_jax.datasets.source import Part, Problem, Source
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.errors import UserError

REPOSITORY = Path(prepare.__file__).parents[2]


def read_ids(ids: tuple[str, ...], log: Path) -> Iterator[Example | Problem]:
    """Examples with these ids. Each time they are asked for, a line is added to `log`; at an id "kill" the process is
    killed, at "fail" it fails, unless the file `log` says that it did so before."""
    before = log.read_text() if log.exists() else ""
    with log.open("a") as file:
        file.write(f"{ids}\n")
    for image_id in ids:
        if image_id.startswith("problem"):
            yield Problem(image_id, "a reason", "a detail", count=3)
            continue
        if image_id == "kill" and str(ids) not in before:
            os.kill(os.getpid(), signal.SIGKILL)
        if image_id == "fail" and str(ids) not in before:
            raise OSError("no more")
        yield Example(None, None, "", image_id, (f"picture {image_id}", "a picture"), "")


def source(log: Path, *parts: tuple[str, ...], **changes: Any) -> Source:
    """One part of each tuple of ids, all in train but for the last, which is in test."""
    splits = ["train"] * (len(parts) - 1) + ["test"]
    made = [Part(split, functools.partial(read_ids, ids, log)) for split, ids in zip(splits, parts, strict=True)]
    fields: dict[str, Any] = {"name": "made", "origin": {}, "parts": made, "has_images": False}
    return Source(**(fields | changes))


def read(data_dir: Path, split: str = "train", name: str = "made") -> list[str]:
    return [example.image_id for example in open_split(name, split, str(data_dir))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_and_metadata(tmp_path: Path) -> None:
    parts = [("a", "b"), ("problem",), ("c",), ("d",)]
    made = source(tmp_path / "log", *parts, encoder="an encoder", notes=["a note"], metadata={"more": [1]})
    summary = prepare.prepare(made, str(tmp_path), max_skipped=0.5)
    assert (read(tmp_path), read(tmp_path, "test")) == (["a", "b", "c"], ["d"])
    assert (summary.images, summary.captions) == ({"train": 3, "test": 1}, {"train": 6, "test": 2})
    assert (summary.words, summary.skipped, summary.notes) == ({2: 8}, {"a reason": 3}, ("a note",))
    info = tfds.builder("made", data_dir=tmp_path).info  # TFDS takes it for its own
    assert info.splits["train"].shard_lengths == [2, 0, 1]
    assert info.metadata["more"] == [1]
    assert info.metadata["encoder"] == "an encoder"
    folder = tmp_path / "made" / "1.0.0"
    assert (folder / "problems.jsonl").read_text().count("a detail") == 1
    assert {path.name for path in folder.iterdir() if not path.name.startswith("made-")} == {
        "dataset_info.json", "features.json", "metadata.json", "problems.jsonl", "report.html"
    }  # fmt: skip


def test_several_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        made = source(tmp_path / "log", *[(f"{i}", f"{i}b") for i in range(5)])
        prepare.prepare(made, str(folder), processes=processes)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_process_is_not_sent_what_others_write(tmp_path: Path) -> None:
    """Or each would hold every record."""
    made = source(tmp_path / "log", ("first id",), ("second id",), problems=[Problem("a line", "a reason", "")] * 9)
    writer = Writer(made, str(tmp_path))
    sent = pickle.dumps(writer.without_parts())
    for text in (b"first id", b"second id", b"a line"):
        assert text in pickle.dumps(writer)
        assert text not in sent


@pytest.mark.parametrize("processes", [1, 2])
def test_finished_shards_are_not_done_again(tmp_path: Path, processes: int) -> None:
    log, parts = tmp_path / "log", [("a",), ("b",), ("fail", "c"), ("d",)]
    with pytest.raises(UserError, match=r"made could not be prepared in .*: no more"):
        prepare.prepare(source(log, *parts), str(tmp_path), processes=processes)
    with pytest.raises(UserError, match="not prepared"):
        read(tmp_path)
    first = log.read_text().splitlines()
    prepare.prepare(source(log, *parts), str(tmp_path), processes=processes)
    again = log.read_text().splitlines()[len(first) :]
    assert "('fail', 'c')" in again
    if processes == 1:
        assert len(again) == 2
    assert read(tmp_path) == ["a", "b", "fail", "c"]


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    log, parts = tmp_path / "log", [("a",), ("kill",), ("b",)]
    with pytest.raises(UserError, match=r"was killed, perhaps for want of memory. The same command goes on"):
        prepare.prepare(source(log, *parts), str(tmp_path), processes=2)
    prepare.prepare(source(log, *parts), str(tmp_path), processes=2)
    assert read(tmp_path) == ["a", "kill"]


def test_a_shard_that_broke_is_written_again(tmp_path: Path) -> None:
    log, parts = tmp_path / "log", [("a",), ("fail",), ("b",)]
    with pytest.raises(UserError):
        prepare.prepare(source(log, *parts), str(tmp_path))
    (shard,) = (tmp_path / "made" / "1.0.0.unfinished").glob("made-train.array_record-00000-of-00002")
    shard.write_bytes(shard.read_bytes()[:-1])
    prepare.prepare(source(log, *parts), str(tmp_path))
    assert log.read_text().splitlines().count("('a',)") == 2
    assert read(tmp_path) == ["a", "fail"]


def test_half_of_something_else_is_not_used(tmp_path: Path) -> None:
    log, parts = tmp_path / "log", [("a",), ("fail",), ("b",)]
    with pytest.raises(UserError):
        prepare.prepare(source(log, *parts, origin={"x": 1}), str(tmp_path))
    other = source(log, ("other",), *parts[1:], origin={"x": 2})
    with pytest.raises(UserError, match=r"made was begun, but not finished, from something else: x was 1, is now 2"):
        prepare.prepare(other, str(tmp_path))
    # Somebody deletes the folder, but not all of it.
    (tmp_path / "made" / "1.0.0.unfinished" / "plan.json").unlink()
    prepare.prepare(other, str(tmp_path))
    assert read(tmp_path) == ["other", "fail"]


def test_a_shard_of_another_plan_is_not_finished(tmp_path: Path) -> None:
    log, parts = tmp_path / "log", [("a",), ("b",)]
    for x in (1, 2):
        writer = Writer(source(log, *parts, origin={"x": x}), str(tmp_path))
        writer.unfinished.mkdir(parents=True, exist_ok=True)
        assert writer.finished(0, writer.source.parts[0]) is None
        writer.write(0, writer.source.parts[0])
        assert writer.finished(0, writer.source.parts[0]) is not None


@pytest.mark.parametrize("field", ["plan", "part", "shard"])
def test_a_note_of_an_earlier_version_counts_for_nothing(tmp_path: Path, field: str) -> None:
    """Its shard is written again, where a preparation goes on that another version has begun."""
    log, parts = tmp_path / "log", [("a",), ("fail",), ("b",)]
    with pytest.raises(UserError):
        prepare.prepare(source(log, *parts), str(tmp_path))
    (path,) = (tmp_path / "made").rglob("*.note.json")
    note = json.loads(path.read_text())
    del note[field]
    path.write_text(json.dumps(note))
    prepare.prepare(source(log, *parts), str(tmp_path))
    assert log.read_text().splitlines().count("('a',)") == 2
    assert read(tmp_path) == ["a", "fail"]


def test_killed_when_it_had_just_got_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source(tmp_path / "log", ("a",), ("b",))
    with monkeypatch.context() as patch:
        patch.setattr("clipcap_jax.datasets.shards.sweep", lambda folder: None)
        prepare.prepare(made, str(tmp_path))
    assert list((tmp_path / "made" / "1.0.0").glob("*.note.json"))
    assert prepare.prepare(made, str(tmp_path)).already_prepared
    assert not list((tmp_path / "made" / "1.0.0").glob("*.note.json"))
    assert (tmp_path / "log").read_text().count("a") == 1


def test_too_many_problems_cost_only_the_shards_that_have_them(tmp_path: Path) -> None:
    log, parts = tmp_path / "log", [("a",), ("b", "problem"), ("c",)]
    with pytest.raises(UserError, match=r"more than --max-skipped=0\.01 allows"):
        prepare.prepare(source(log, *parts), str(tmp_path))
    assert prepare.prepare(source(log, *parts), str(tmp_path), max_skipped=0.9).skipped == {"a reason": 3}
    assert log.read_text().splitlines().count("('a',)") == 1
    assert log.read_text().splitlines().count("('b', 'problem')") == 2


def test_shards_of_two_folders_are_not_mixed(tmp_path: Path) -> None:
    made = source(tmp_path / "log", ("a",), ("b",), found={"images": "/photos"})
    writer = Writer(made, str(tmp_path))
    writer.begin(alone=True)
    writer.write(0, made.parts[0])
    with pytest.raises(UserError, match="from something else: images from was /photos, is now /moved"):
        prepare.prepare(dataclasses.replace(made, found={"images": "/moved"}), str(tmp_path))


def test_an_error_of_the_source_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    def broken() -> Iterator[Example]:
        raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake in the program"):
        prepare.prepare(Source("made", {}, [Part("train", broken)], has_images=False), str(tmp_path))


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    """It is told before the work, not after it."""
    made = source(tmp_path / "log", ("a",), ("b",))
    prepare.prepare(made, str(tmp_path))
    folder = tmp_path / "made" / "1.0.0"
    (folder / "dataset_info.json").unlink()
    (tmp_path / "log").unlink()
    with pytest.raises(UserError, match=f"{folder} holds a part of a data set: delete it"):
        prepare.prepare(made, str(tmp_path))
    assert not (tmp_path / "log").exists()


def test_processes_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    child = get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    with pytest.raises(UserError, match="no more"):
        prepare.prepare(source(tmp_path / "log", ("a",), ("fail",), ("b",)), str(tmp_path), processes=2)
    assert child.is_alive()
    child.terminate()
    child.join()


def test_prepared_by_an_earlier_version(tmp_path: Path) -> None:
    made = source(tmp_path / "log", ("a",), ("b",))
    prepare.prepare(made, str(tmp_path))
    path = tmp_path / "made" / "1.0.0" / "metadata.json"
    path.write_text(json.dumps({"source": {}, "captions": {"train": 2}, "problems": [], "notes": []}))
    with pytest.raises(UserError, match=r"made/1.0.0 lacks .*, or was prepared by an earlier version: delete it"):
        prepare.prepare(made, str(tmp_path))


def read_slowly(go: Path) -> Iterator[Example]:
    """One example, given once the file `go` is there."""
    go.with_name("asked").touch()
    while not go.exists():
        time.sleep(0.01)
    yield Example(None, None, "", "a", ("a picture",), "")


def prepare_slowly(folder: Path) -> Summary:
    return prepare.prepare(
        Source("made", {}, [Part("train", functools.partial(read_slowly, folder / "go"))], has_images=False),
        str(folder),
    )


def test_two_processes_at_once(tmp_path: Path) -> None:
    """The second is refused while the first is at work, and afterwards finds it done."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        first = pool.submit(prepare_slowly, tmp_path)
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"made is being prepared in .* by another process"):
            prepare_slowly(tmp_path)
        with pytest.raises(UserError, match="not prepared"):
            read(tmp_path)
        (tmp_path / "go").touch()
        assert not first.result().already_prepared
    assert prepare_slowly(tmp_path).already_prepared
    assert read(tmp_path) == ["a"]


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    made = source(tmp_path / "log", ("a", "b"), ("c", "a"), ("a",))
    with pytest.raises(UserError, match="made: 1 image ids occur more than once in train: a"):
        prepare.prepare(made, str(tmp_path))
    with pytest.raises(UserError, match="not prepared"):
        read(tmp_path)


def test_what_is_expected_is_no_problem(tmp_path: Path) -> None:
    made = source(tmp_path / "log", ("a", "problem"), ("b",))
    with pytest.raises(UserError, match=r"made: 3 problems in 5 records, more than --max-skipped=0.5 allows"):
        prepare.prepare(made, str(tmp_path), max_skipped=0.5)
    summary = prepare.prepare(dataclasses.replace(made, expected=["a reason"]), str(tmp_path), max_skipped=0.0)
    assert summary.skipped == {"a reason": 3}


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made: there is nothing to prepare"):
        prepare.prepare(source(tmp_path / "log", (), ()), str(tmp_path))


def test_a_disk_that_fills(tmp_path: Path) -> None:
    """Files may not grow beyond a size: the system's answer is the same as on a full disk."""
    script = f"""
import resource, signal
from clipcap_jax.datasets import prepare_shapes
from clipcap_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    prepare_shapes({str(tmp_path)!r}, {{"train": 500}})
except UserError as error:
    print("UserError:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert "UserError: shapes could not be prepared in" in done.stdout, done.stderr
    with pytest.raises(UserError, match="not prepared"):
        open_split("shapes", "train", str(tmp_path))
    prepare_shapes(str(tmp_path), {"train": 500})
    assert len(open_split("shapes", "train", str(tmp_path))) == 500


def test_the_page(tmp_path: Path) -> None:
    prepare_shapes(str(tmp_path), {"train": 30, "test": 3})
    page = (tmp_path / "shapes" / "1.0.0" / "report.html").read_text()
    assert page.count("<img ") == 12 + 3
    lengths = set()
    for split in ("train", "test"):
        for example in open_split("shapes", split, str(tmp_path)):
            lengths |= {caption.count(" ") + 1 for caption in example.captions}
            assert split == "train" or all(caption in page for caption in example.captions)
    assert page.count('<i style="height:') == max(lengths) - min(lengths) + 1
    assert "http" not in page.replace("http-equiv", "")
    assert "<dt>scenes</dt><dd>train 30, test 3</dd>" in page  # what it was prepared from


def test_the_page_names_the_source_and_the_tower(tmp_path: Path) -> None:
    found = {
        "annotations": ["<a>.json", "b.json"],
        "images": "/photos",
        "encoder": "ViT-B/32, weights 1f",
        "normalized": False,
    }
    made = source(tmp_path / "log", ("a",), ("b",), found=found | {"x": None})
    prepare.prepare(made, str(tmp_path))
    page = (tmp_path / "made" / "1.0.0" / "report.html").read_text()
    assert re.findall("<dt>(.*)</dt><dd>(.*)</dd>", page) == [
        ("annotations", "&lt;a&gt;.json, b.json"),
        ("images", "/photos"),
        ("encoder", "ViT-B/32, weights 1f"),
        ("normalized", "no"),
    ]


def prepare_script(data_dir: Path, processes: int) -> str:
    return f"""
from clipcap_jax.datasets import prepare_shapes, shapes
shapes.PICTURES_PER_SHARD = 100
if __name__ == "__main__":
    print("begins", flush=True)
    prepare_shapes({str(data_dir)!r}, {{"train": 1500, "test": 60}}, processes={processes})
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """20 kills: what comes out in the end has the bytes of what was never interrupted."""
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 100)
    prepare_shapes(str(tmp_path / "whole"), {"train": 1500, "test": 60})
    script = tmp_path / "script.py"
    script.write_text(prepare_script(tmp_path / "killed", processes))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    drawn, kills, finished = random.Random(processes), 0, tmp_path / "killed" / "shapes" / "1.0.0"
    while kills < 20:
        started = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE)
        assert started.stdout is not None
        assert started.stdout.readline() == b"begins\n"  # importing took longer than all the rest
        time.sleep(drawn.uniform(0, 2))
        kills += started.poll() is None
        started.kill()
        started.communicate()
        # Of a process at most a shard and its note; what earlier ones left is gone.
        assert len(list((tmp_path / "killed").rglob("*.tmp"))) <= 2 * processes
        if finished.exists():
            assert files(tmp_path / "whole" / "shapes" / "1.0.0") == files(finished)
            shutil.rmtree(tmp_path / "killed")
    done = subprocess.run([sys.executable, script], env=environment)
    assert done.returncode == 0
    assert files(tmp_path / "whole" / "shapes" / "1.0.0") == files(finished)
