"""Runs on gs:// (see buckets.py): training, what it leaves, and who may go on.

In the folder that stands in for gs://, tensorstore, which writes the arrays, cannot be given that folder as a bucket:
it gets its driver for files there. All else is as on gs://: names, listings, and the file that says what is whole. In
the emulator the arrays take the way they take to gs:// too.
"""

import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.path import gcs_utils
from rich.console import Console
from test_scripts import finish
from test_scripts import start as start_script
from tiny import Source, assert_same, make_config, saved, train, train_until

from clipcap_jax import files
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.checkpoints import store
from clipcap_jax.errors import UserError
from clipcap_jax.training import alone
from clipcap_jax.training.logs import Monitor

STEPS = 15


@pytest.fixture(autouse=True)
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "RENEWED", 0.2)
    monkeypatch.setattr(alone, "WATCHED", 2.0)
    monkeypatch.setattr(alone, "SETTLED", 0.1)


@pytest.fixture
def run(gs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder in a bucket, which is not there yet."""
    if (tmp_path / "bucket").exists():

        def in_the_folder(path: str) -> dict[str, str]:
            local = path.replace("gs:/", str(tmp_path))
            return {"driver": "file", "path": local if local.endswith("_sharding") else f"{local}/"}

        monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", in_the_folder)
        monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return store.run_folder(f"{gs}/runs/tiny")


def logged(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "train/pairs_per_second"} for line in lines]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="session")
def undisturbed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk."""
    run = tmp_path_factory.mktemp("undisturbed")
    train(run, make_config(data_dir, MAPPER))
    return run


MAPPER: dict[str, Any] = {"train.trainable": ("mapper",)}  # so that there is something frozen


def test_a_stopped_run_goes_on_bit_for_bit(run: Path, undisturbed: Path, data_dir: Path) -> None:
    config = make_config(data_dir, MAPPER)
    assert "Stopped after step 9" in train_until(run, config, 9)
    assert "Going on after step 9 of 15" in train(run, config)
    for step in (12, STEPS):
        assert_same(saved(run, step), saved(undisturbed, step))
    assert logged(run) == logged(undisturbed)
    assert len(names(run / "tensorboard")) == 2
    assert names(run) == {"checkpoints", "config.json", "frozen", "metrics.jsonl", "tensorboard"}  # no lock
    assert f"Trained {STEPS} steps" in train(run, config)  # nothing left to do
    assert {*Captioner.load(run).params} == {"mapper", "gpt2"}


def test_killed_while_saving(run: Path, undisturbed: Path, data_dir: Path) -> None:
    """What is not whole there has its name already."""

    def undo(*written: str) -> None:
        for name in written:
            (run / name / "commit_success.txt").unlink()
            assert not ocp.utils.is_checkpoint_finalized(run / name)

    config = make_config(data_dir, MAPPER)
    train_until(run, config, 5)
    undo("frozen")
    with pytest.raises(UserError, match=r"frozen is not whole: .*\nCopy it again"):
        Captioner.load(run, "4")
    undo("checkpoints/4", "checkpoints/5")
    assert "Going on" not in train_until(run, config, 7)
    undo("checkpoints/7")
    assert "Going on after step 6 of 15" in train(run, config)
    assert_same(saved(run, STEPS), saved(undisturbed, STEPS))
    assert names(run / "checkpoints") == {"4", "6", "8", "12", "15"}


def test_a_damaged_checkpoint_is_set_aside(run: Path, undisturbed: Path, data_dir: Path) -> None:
    config = make_config(data_dir, MAPPER)
    train_until(run, config, 7)
    (run / "checkpoints" / "7" / "params").rmtree()  # type: ignore[attr-defined]
    kept = names(run / "checkpoints" / "7")
    printed = train(run, config)
    assert "checkpoints/7 is gone or not whole" in printed
    assert "Going on after step 6 of 15" in printed
    [aside] = [run / name for name in names(run) if name.startswith("damaged-7-")]
    assert f"It is {aside} now, and the one of step 6 is used" in printed
    assert names(aside) == kept
    assert_same(saved(run, STEPS), saved(undisturbed, STEPS))


def test_kept_are_the_newest_and_the_best(run: Path, data_dir: Path) -> None:
    config = make_config(data_dir, {"checkpoint.keep": 2, "checkpoint.every": 3, "evaluate.every": 3})
    with mock.patch("clipcap_jax.checkpoints.store._best_metric", lambda metrics: -metrics["loss_permuted"]):
        train(run, config)
    with store.opened(run) as checkpoints:
        found = checkpoints.steps()
    assert found[-2:] == [12, 15]
    assert len(found) == len(names(run / "checkpoints")) <= 3


def test_a_second_training_is_refused(run: Path, data_dir: Path) -> None:
    console = Console(quiet=True)
    with (
        alone.alone(run, console),
        pytest.raises(UserError, match=r"another process is training in gs://bucket/runs/tiny \(process \d+ on .*wait"),
    ):
        train(run, make_config(data_dir))
    assert not (run / ".lock").exists()
    assert not (run / "checkpoints").exists()
    with alone.alone(run, console):  # which waits for nobody
        assert names(run) == {".lock"}


def test_a_killed_trainings_lock_is_taken_over(run: Path, data_dir: Path) -> None:
    config = make_config(data_dir, {"train.epochs": 0.2})
    run.mkdir(parents=True)
    (run / ".lock").write_text("0123 17 process 4 on another")
    printed = train(run, config)
    assert "is or was another training's (process 4 on another). Looking for 2 seconds whether that still" in printed
    assert "It does not: this one goes on in its place." in printed
    assert "Trained 1 steps" in printed
    assert ".lock" not in names(run)


def test_one_that_ends_while_it_is_watched_is_not_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "WATCHED", 1e9)
    run.mkdir(parents=True)
    (run / ".lock").write_text("0123 17 process 4 on another")

    def end(seconds: float) -> None:
        (run / ".lock").unlink(missing_ok=True)

    with mock.patch.object(time, "sleep", end), alone.alone(run, Console(quiet=True)) as hold:
        hold.look()
        hold.check()


def test_of_two_that_begin_at_once_one_goes_on(run: Path) -> None:
    run.mkdir(parents=True)
    first, second = alone.Lease(run), alone.Lease(run)

    def late(seconds: float) -> None:  # the second has seen no lock, as the first had not written it
        second._write()

    with mock.patch.object(time, "sleep", late), pytest.raises(UserError, match="another process is training in"):
        first.take(Console(quiet=True))
    first.release()
    second.renew()
    second.check()
    assert (run / ".lock").read_text().split()[:2] == [second._token, "2"]


@pytest.mark.parametrize("late", [False, True], ids=["noticed in time", "noticed before saving"])
def test_a_run_that_was_taken_over_is_left_alone(
    run: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    push, other = Monitor.push, "0123 1 process 4 on another"
    if late:
        monkeypatch.setattr(alone, "RENEWED", 1e9)

    def push_and_lose(self: Monitor, step: int, metrics: Any) -> None:
        push(self, step, metrics)
        if step == 7:
            (run / ".lock").write_text(other)
            (run / "metrics.jsonl").write_text("the other's")
            if not late:
                time.sleep(1)
            while (run / ".lock").read_text() != other:  # a renewal had begun: the other would see that, and try again
                (run / ".lock").write_text(other)
                time.sleep(1)

    with (
        mock.patch.object(Monitor, "push", push_and_lose),
        pytest.raises(UserError, match=r"another training \(process 4 on another\) has taken gs://.* over"),
    ):
        train(run, make_config(data_dir))
    assert names(run / "checkpoints") == {"4", "6"}
    assert (run / ".lock").read_text() == other
    assert (run / "metrics.jsonl").read_text() == "the other's"


def test_a_store_that_fails_for_a_while(run: Path, data_dir: Path, undisturbed: Path) -> None:
    """Neither the lock nor the logs end a training; what is written last is there, or is told where it is."""
    write, failing = type(run).write_bytes, True

    def fail(path: Path, content: bytes) -> int:
        if failing and path.name == "metrics.jsonl" and files.is_remote(path):
            raise OSError("the connection broke")
        return write(path, content)

    with mock.patch.object(type(run), "write_bytes", fail):
        printed = train_until(run, make_config(data_dir, MAPPER), 5)
    assert printed.count("Warning: the logs cannot be copied to gs://bucket/runs/tiny for now: the connection br") == 1
    [place] = [Path(word) for word in printed.split() if "clipcap_jax_logs_" in word]
    assert "Warning: the last lines of the logs are in" in printed
    assert logged(place) == logged(undisturbed)[:5]
    failing = False
    for path in (place / "metrics.jsonl", *(place / "tensorboard").iterdir()):
        (run / path.relative_to(place)).write_bytes(path.read_bytes())
    train(run, make_config(data_dir, MAPPER))
    assert logged(run) == logged(undisturbed)


def test_a_store_that_cannot_be_written(run: Path, data_dir: Path) -> None:
    config = make_config(data_dir, MAPPER)
    with (
        mock.patch.object(type(run), "write_text", side_effect=PermissionError("Forbidden: storage.objects.create")),
        pytest.raises(UserError, match=r"gs://bucket/runs/tiny cannot be written: Forbidden: storage.objects.create"),
    ):
        train(run, config)
    unavailable = ValueError("UNAVAILABLE: Error writing manifest.ocdbt [http_response_code='503']")
    with (
        mock.patch.object(ocp.CheckpointManager, "save", side_effect=unavailable),
        pytest.raises(UserError, match=r"step 4 to gs://.* failed: UNAVAIL.* no whole checkpoint yet\. Mend that"),
    ):
        train(run, config)
    assert len(logged(run)) == 4
    assert ".lock" not in names(run)


def test_other_stores_are_refused() -> None:
    with pytest.raises(UserError, match="s3://bucket/run: runs and their checkpoints lie on a disk or on gs://"):
        Captioner.load("s3://bucket/run")
    with pytest.raises(UserError, match="nothing is known of ftp://; gs:// can be reached"):
        files.place("ftp://host/page.html")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_without_gcsfs(data_dir: Path) -> None:
    run = store.run_folder("gs://bucket/run")
    for use in (lambda: train(run, make_config(data_dir)), lambda: Captioner.load("gs://bucket/run")):
        with pytest.raises(UserError, match=r"gs://bucket/run.* cannot be reached: .*pip install clipcap_jax\[gcs\]"):
            use()


def test_a_bucket_that_is_not_there(emulated_gs: str, data_dir: Path) -> None:
    with pytest.raises(UserError, match="gs://gone/run cannot be written: there is no such file or bucket"):
        train(store.run_folder("gs://gone/run"), make_config(data_dir))
    with pytest.raises(UserError, match="gs://gone/run holds no checkpoints"):
        Captioner.load("gs://gone/run")


def start(*command: str) -> subprocess.Popen[str]:
    return start_script(*command, environment={**os.environ, "COLUMNS": "200"})


@pytest.mark.slow
def test_the_scripts_and_the_command(emulated_gs: str, data_dir: Path, source: Source, tmp_path: Path) -> None:
    """As a user starts them; evaluation follows the run from another process."""
    run = f"{emulated_gs}/runs/pixels"
    following = start("evaluate.py", f"--workdir={run}", "--follow", "--split=val", "--nometeor")
    flags = ["--config=tests/tiny.py:pixels", f"--config.data.data_dir={data_dir}", f"--workdir={run}"]
    assert f"Trained {STEPS} steps" in finish(start("train.py", *flags, "--config.checkpoint.keep=9"))
    printed = finish(following)
    there = store.run_folder(run)
    steps = {int(name) for name in names(there / "checkpoints")}
    assert names(there / "evaluations") == {f"records-both-val-{step}-beam1" for step in steps}
    printed = finish(start("evaluate.py", f"--workdir={run}", "--checkpoint=latest", "--nometeor"))
    results = there / "evaluations" / "records-both-test-15-beam1"
    assert str(results) in printed
    assert names(results) == {"captions.json", "scores.json", "scores.md", "page.html"}
    assert len(json.loads((results / "captions.json").read_text())) == 6

    picture = str(source.pictures / "00.png")
    finish(start("-m", "clipcap_jax", "caption", run, picture, f"--output={run}/captions.jsonl"))
    finish(start("-m", "clipcap_jax", "caption", run, picture, f"--output={tmp_path}/captions.jsonl"))
    assert (there / "captions.jsonl").read_text() == (tmp_path / "captions.jsonl").read_text()
    finish(start("-m", "clipcap_jax", "convert", "to-gpt2", run, str(tmp_path / "gpt2")))
    based = start("train.py", *flags[:2], f"--config.train.init_from={run}", f"--workdir={tmp_path}/based")
    assert f"Trained {STEPS} steps" in finish(based)
