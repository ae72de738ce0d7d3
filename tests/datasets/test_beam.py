"""Beam's local runner, with workers that are processes of their own, beside the pool of one machine."""

import functools
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import needs
import pytest
from PIL import Image
from shards import keyed, sample, write_stats, write_tar

import clipcap_jax.datasets.source
from clipcap_jax.datasets import Example, Problem, beam, prepare, prepare_shapes
from clipcap_jax.datasets.coco import coco_source
from clipcap_jax.datasets.conceptual import conceptual_source
from clipcap_jax.datasets.shards import Writer
from clipcap_jax.datasets.source import Part, Source
from clipcap_jax.errors import UserError

LOCAL = ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
needs_beam = pytest.mark.skipif(needs.lacks("apache_beam"), reason="needs Apache Beam: the extra beam")


def contents(data_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data_dir)): path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}


def coco(folder: Path) -> Source:
    """23 pictures and what Karpathy's file says of them; one is not there."""
    images = []
    for number in range(23):
        name = f"COCO_val2014_{number:012}.jpg"
        (folder / "val2014").mkdir(exist_ok=True)
        if number != 7:
            Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "val2014" / name)
        captions = [{"raw": f"A picture of the number {number}, caption {i}."} for i in range(5)]
        split = {0: "val", 1: "test", 2: "restval"}.get(number % 5, "train")
        images.append(
            {"filepath": "val2014", "filename": name, "cocoid": number, "split": split, "sentences": captions}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return coco_source(folder)


def img2dataset(folder: Path) -> Source:
    """5 tars; in one of them a picture is broken, and one was cut off."""
    for shard in range(5):
        samples = keyed(*range(10_000 * shard, 10_000 * shard + 6))
        if shard == 2:
            samples["000020006"] = sample(20_006) | {"jpg": b"\xff\xd8\xff\xe0 and no more"}
        write_tar(folder / f"{shard:05}.tar", samples)
        write_stats(folder / f"{shard:05}_stats.json", len(samples), dead=3)
    cut = folder / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:-11_000])
    return conceptual_source("cc12m", folder)


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize("make", [coco, img2dataset])
def test_the_same_bytes_as_one_machine(
    make: Callable[[Path], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipcap_jax.datasets.source, "PICTURES_PER_SHARD", 4)
    (tmp_path / "given").mkdir()
    source = make(tmp_path / "given")
    assert len(source.parts) >= 5
    by_pool = prepare.prepare(source, str(tmp_path / "pool"), max_skipped=0.5, processes=2)
    by_beam = prepare.prepare(source, str(tmp_path / "beam"), max_skipped=0.5, beam=LOCAL)
    assert contents(tmp_path / "pool") == contents(tmp_path / "beam")
    assert by_beam.skipped == by_pool.skipped
    assert by_beam.skipped
    assert prepare.prepare(source, str(tmp_path / "beam"), max_skipped=0.5, beam=LOCAL).already_prepared


def read(name: str, log: Path) -> Iterator[Example | Problem]:
    """An example. A line is added to `log`; the first time, what is named "kill" kills its process, "fail" fails."""
    before = log.read_text() if log.exists() else ""
    with log.open("a") as file:
        file.write(f"{name}\n")
    if name == "kill" and name not in before:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "fail" and name not in before:
        raise FileNotFoundError(f"there is no {log.parent}/pictures")
    if name == "problem":
        yield Problem(name, "a reason", "a detail")
    yield Example(None, None, "", name, (f"picture {name}", "a picture"), "")


def made(log: Path, *names: str, **changes: Any) -> Source:
    """A shard of each name."""
    parts = [Part("train", functools.partial(read, name, log)) for name in names]
    return Source(name="made", origin={}, parts=parts, has_images=False, **changes)


def set_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Beam's workers, which import this file."""
    here = Path(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parent, here.parents[1], here.parents[2]))))


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"), [("kill", "Worker subprocess exited"), ("fail", "FileNotFoundError: there is no .*/pictures")]
)
def test_a_worker_that_ends_on_the_way(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam's local runner does not start another one: the same command goes on, and the bytes are the same."""
    set_path(monkeypatch)
    source = made(tmp_path / "log", "a", "b", name, "c", "d", "e")
    with pytest.raises(UserError, match=rf"Beam's job failed, \d shards are not written: {told}.*The same command"):
        prepare.prepare(source, str(tmp_path / "beam"), beam=LOCAL)
    writer = Writer(source, str(tmp_path / "beam"))
    kept = [index for index in range(6) if writer.finished(index, writer.source.parts[index])]
    assert not list(writer.unfinished.glob("*.part"))
    prepare.prepare(source, str(tmp_path / "beam"), beam=LOCAL)
    prepare.prepare(source, str(tmp_path / "pool"), processes=2)
    assert contents(tmp_path / "pool") == contents(tmp_path / "beam")
    asked = (tmp_path / "log").read_text().splitlines()
    for index in kept:
        assert asked.count("ab?cde"[index]) == 2  # once by Beam, once by the pool


@needs_beam
def test_too_many_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_path(monkeypatch)
    with pytest.raises(UserError, match=r"1 problems in 2 records, more than --max-skipped=0\.01 allows"):
        prepare.prepare(made(tmp_path / "log", "problem"), str(tmp_path), beam=())


def test_what_a_worker_does(tmp_path: Path) -> None:
    """It writes what is wanted and not there: a shard may be given to several workers, or once more to one."""
    log = tmp_path / "log"
    writer = Writer(made(log, "a", "b"), str(tmp_path))
    writer.begin(alone=True)
    beam._write_in_worker(0, writer.without_parts())
    assert writer.finished(0, writer.source.parts[0]) is None
    writer.part_file(0).write_bytes(pickle.dumps(writer.source.parts[0]))
    for _ in range(2):
        beam._write_in_worker(0, writer.without_parts())
    assert writer.finished(0, writer.source.parts[0]) is not None
    assert log.read_text() == "a\n"


def idle(writer: Writer, indices: list[int], options: list[str], sender: Connection) -> None:
    sender.send("DONE")


@needs_beam
def test_workers_that_see_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that does nothing, and says that it is done."""
    monkeypatch.setattr(beam, "_job", idle)
    monkeypatch.setattr(beam, "_PATIENCE", 1.0)
    with pytest.raises(UserError, match=r"1 shards are not in .*1\.0\.0\.unfinished: do all workers see this folder"):
        prepare.prepare(made(tmp_path / "log", "a"), str(tmp_path), beam=())


def test_without_beam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r'--beam needs Apache Beam: pip install "clipcap_jax\[beam\]"'):
        prepare_shapes(str(tmp_path), {"train": 1}, beam=())
