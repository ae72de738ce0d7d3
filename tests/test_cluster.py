"""Several processes of one machine, as several hosts: they train, evaluate, embed and caption as one would, and end
together."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from clip_files import write_clip
from failing_saves import STAGES
from tiny import Clipcap, Source, assert_close, assert_same, named, saved

from clipcap_jax.commands.journal import Journal, Row

ROOT = Path(__file__).parents[1]
STEPS = 15
# What JAX's collectives on CPUs tell, from a thread of each device: the pieces of two lines may come mixed.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |[\d\n]"
)
Started = list[subprocess.Popen[str]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def start(*command: object, processes: int, devices: int) -> Started:
    """Start as many processes of a command, with as many devices each."""
    return start_each([command] * processes, devices=devices)


def start_each(commands: Sequence[Sequence[object]], *, devices: int) -> Started:
    """Start a process of each command."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    cluster = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={len(commands)}"]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command), *([*cluster, f"--process_id={index}"] if len(commands) > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, command in enumerate(commands)
    ]


def ended(started: Started) -> list[str]:
    """What they print until they end, without an error."""
    printed = [process.communicate(timeout=600)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(printed)
    assert not GLOO.sub("", "".join(printed[1:])), "\n".join(printed[1:])
    return printed


def train(data_dir: Path, run: Path, **changes: object) -> list[object]:
    """The command of a tiny run whose result does not depend on the devices: without dropout, and without parameters
    that jump where a gradient is all but 0."""
    values: dict[str, object] = {"model.gpt2.dropout": 0.0, "model.gpt2.word_dropout": 0.0, "optimizer.epsilon": 1e-3}
    values |= {"data.data_dir": data_dir, **changes}
    overrides = (f"--config.{name}={value}" for name, value in values.items())
    return [ROOT / "train.py", f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={run}", *overrides]


def logged(run: Path) -> list[dict[str, float]]:
    """All that does not depend on time."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name != "train/pairs_per_second"} for line in lines]


def assert_same_run(actual: Path, expected: Path, step: int = STEPS) -> None:
    """To 1e-5: losses, gradients and all that the last checkpoint holds."""
    for line, other in zip(logged(actual), logged(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    assert_close(saved(actual, step), saved(expected, step))


@pytest.fixture(scope="module")
def alone(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with four devices."""
    run = tmp_path_factory.mktemp("alone")
    ended(start(*train(data_dir, run), processes=1, devices=4))
    return run


def evaluated(run: Path, output: Path, *flags: str, processes: int, devices: int) -> tuple[Any, dict[str, Any]]:
    """The captions and what scores.json holds, by name."""
    command = [ROOT / "evaluate.py", f"--workdir={run}", "--nometeor", f"--output={output}", *flags]
    ended(start(*command, processes=processes, devices=devices))
    scores = json.loads((output / "scores.json").read_text())
    scores["details"].pop("date")
    return json.loads((output / "captions.json").read_text()), named(scores)


def assert_same_evaluation(actual: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        from_logits = "loss" in name or "CLIPScore" in name
        assert actual[1][name] == (pytest.approx(value, rel=1e-5) if from_logits else value), name


def test_two_processes_train_and_evaluate_as_one(data_dir: Path, alone: Path, tmp_path: Path) -> None:
    first, _ = ended(start(*train(data_dir, tmp_path), processes=2, devices=2))
    assert f"Trained {STEPS} steps" in first
    assert "Devices: 4 cpu devices, in 2 processes; layout data" in first
    assert_same_run(tmp_path, alone)
    flags = ("--split=val", f"--clipscore={write_clip(tmp_path / 'clip')}")
    one, two = (
        evaluated(alone, tmp_path / str(processes), *flags, processes=processes, devices=4 // processes)
        for processes in (1, 2)
    )
    assert_same_evaluation(two, one)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_devices(alone: Path, tmp_path: Path) -> None:
    """Of 5 pictures, which none but one device divides, by beam search."""
    one, *others = (
        evaluated(
            alone,
            tmp_path / f"{processes} by {devices}",
            "--split=val",
            "--beam_size=3",
            processes=processes,
            devices=devices,
        )
        for processes, devices in ((1, 1), (1, 3), (1, 8), (2, 1), (2, 2))
    )
    for other in others:
        assert_same_evaluation(other, one)


@pytest.mark.slow
def test_the_demo_s_run_in_two_processes(tmp_path: Path) -> None:
    """A part of it; the sum of two numbers does not depend on where they are, so the two runs are the same."""
    results = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        flags = [
            f"--workdir={run}",
            f"--config.data.data_dir={tmp_path}",
            "--config.train.epochs=0.1",
            "--config.evaluate.images=0",
        ]
        ended(start(ROOT / "train.py", *flags, processes=processes, devices=2 // processes))
        results.append(
            evaluated(run, run / "scores", "--checkpoint=latest", "--split=test[:200]", processes=processes, devices=1)
        )
    assert_same_evaluation(*results)


def test_two_processes_train_sharded(data_dir: Path, alone: Path, tmp_path: Path) -> None:
    ended(start(*train(data_dir, tmp_path, **{"parallel.layout": "fsdp"}), processes=2, devices=2))
    assert_same_run(tmp_path, alone)


VARIANTS: dict[str, dict[str, object]] = {
    "mlp": {},
    "transformer": {"model.mapper.kind": "transformer", "train.trainable": "('mapper',)"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("processes", "devices", "layout"),
    [(2, 1, "data"), (2, 2, "data"), (4, 1, "data"), (2, 1, "fsdp"), (2, 2, "fsdp"), (4, 1, "fsdp")],
)
def test_all_ways_of_training(
    data_dir: Path, tmp_path: Path, processes: int, devices: int, layout: str, accumulation: int, variant: str
) -> None:
    """Of the embeddings of captions of uneven lengths, the last batch of an epoch not full."""
    changes = {**VARIANTS[variant], "train.batch_size": 16, "evaluate.images": 0}
    ended(start(*train(data_dir, tmp_path / "alone", **changes), processes=1, devices=1))
    changes |= {"train.accumulation": accumulation, "parallel.layout": layout}
    ended(start(*train(data_dir, tmp_path / "run", **changes), processes=processes, devices=devices))
    assert_same_run(tmp_path / "run", tmp_path / "alone", 9)


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(data_dir: Path, alone: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle, on other devices, in other processes and another layout, and back."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    for step, processes, devices, layout in (
        (4, 2, 2, "fsdp"),
        (6, 1, 1, "data"),
        (8, 4, 1, "data"),
        (12, 1, 2, "fsdp"),
    ):
        for folder in (run / "checkpoints").iterdir():
            if int(folder.name) > step:
                shutil.rmtree(folder)
        command = train(data_dir, run, **{"parallel.layout": layout})
        printed = ended(start(*command, processes=processes, devices=devices))
        assert f"Going on after step {step} of {STEPS}" in printed[0]
        assert_same_run(run, alone)


def test_embedding_and_captioning_are_shared(
    data_dir: Path, pixels_run: Path, source: Source, tmp_path: Path, clipcap: Clipcap
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    command = ["-m", "clipcap_jax", "embed", "records/both", "--clip", write_clip(tmp_path / "clip")]
    first, _ = ended(start(*command, "--data-dir", tmp_path / "data", processes=2, devices=1))
    assert "--config.data.name=embeddings/records_both" in first

    pictures = tmp_path / "pictures"
    shutil.copytree(source.pictures, pictures)
    (pictures / "05.png").write_bytes(b"no picture")
    (pictures / "06.png").write_bytes(b"no picture")
    command = ["caption", pixels_run, pictures, "--batch-size", 6]
    first, _ = ended(start("-m", "clipcap_jax", *command, "--output", tmp_path / "two.jsonl", processes=2, devices=1))
    assert "26 captions, 2 pictures skipped" in first
    assert clipcap(*command, "--output", tmp_path / "one.jsonl") == 0
    one, two = (
        list(map(json.loads, (tmp_path / name).read_text().splitlines())) for name in ("one.jsonl", "two.jsonl")
    )
    scores = np.array([[line.pop("score", 0.0) for line in lines] for lines in (one, two)])
    assert one == two
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)

    # What one process has done, and two go on with: it alone knows how much that is.
    def interrupted(self: Journal, row: Row) -> None:
        if self.done == 9:
            raise KeyboardInterrupt
        add(self, row)

    add = Journal.add
    with mock.patch.object(Journal, "add", interrupted):
        assert clipcap(*command, "--output", tmp_path / "rest.jsonl") == 130
    first, _ = ended(start("-m", "clipcap_jax", *command, "--output", tmp_path / "rest.jsonl", processes=2, devices=1))
    assert "Going on after 9 of 28 pictures" in first
    rest = list(map(json.loads, (tmp_path / "rest.jsonl").read_text().splitlines()))
    assert [(line["image"], line.get("caption")) for line in rest] == [
        (row["image"], row.get("caption")) for row in one
    ]


def steps_logged(run: Path, started: Started, count: int) -> None:
    """Wait until a run has logged as many lines."""
    log = run / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in started), [process.communicate()[0] for process in started]
        time.sleep(0.1)


# For as long as a test needs.
LONG = {"train.epochs": 10000.0, "evaluate.images": 0, "checkpoint.every": 100}


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_is_killed(data_dir: Path, tmp_path: Path, killed: int) -> None:
    started = start(*train(data_dir, tmp_path, **LONG), "--lost_after=10", processes=2, devices=1)
    steps_logged(tmp_path, started, 5)
    started[killed].kill()
    printed = [process.communicate(timeout=300)[0] for process in started][1 - killed]
    assert started[1 - killed].returncode != 0
    if killed == 1:
        assert "process 1 of 2 was lost: it was not heard of for 10 s" in printed
    else:  # whose end JAX does not survive
        assert "Process 1 of 2 was ended from outside" in printed
        assert "process 0 was lost" in printed
    assert "The same command goes on from the last checkpoint" in printed


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_disk_of_one_is_full(data_dir: Path, tmp_path: Path, failing: int) -> None:
    """In the sharded layout each process writes its part of a checkpoint; the first one the logs too."""
    changes = {**LONG, "parallel.layout": "fsdp", "train.log_every": 100 if failing else 1}
    started = start(*train(data_dir, tmp_path, **changes), processes=2, devices=1)
    steps_logged(tmp_path, started, 1)
    resource.prlimit(started[failing].pid, resource.RLIMIT_FSIZE, (100, 100))
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    assert all("ake room" in text for text in printed), printed
    assert f"process {failing} of 2: " in printed[1 - failing]


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        pytest.param(stage, processes, marks=[] if (stage, processes) == ("json", 2) else pytest.mark.slow)
        for stage in STAGES
        for processes in (1, 2)
    ],
)
def test_a_save_that_fails(data_dir: Path, alone: Path, tmp_path: Path, stage: str, processes: int) -> None:
    """At any stage: all say so and end, and the run goes on from the checkpoint before."""
    _, *flags = train(data_dir, tmp_path)
    command = [ROOT / "tests" / "failing_saves.py", stage, 6, *flags]
    started = start(*command, processes=processes, devices=4 // processes)
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2] * processes, printed
    for text in printed:
        assert "Permission denied: 'a test'. The newest whole checkpoint is 6. Mend that" in text
        assert "Traceback" not in text
    first, *_ = ended(start(*train(data_dir, tmp_path), processes=processes, devices=4 // processes))
    assert "Going on after step 6 of 15" in first
    assert_same_run(tmp_path, alone)


def test_different_flags(data_dir: Path, tmp_path: Path) -> None:
    started = start_each([train(data_dir, tmp_path, **{"train.seed": seed}) for seed in (0, 1)], devices=1)
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    assert all("the processes have different settings, data or checkpoints" in text for text in printed)


def test_fewer_than_said(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--num_processes=2"], capture_output=True, text=True, timeout=300
    )
    assert started.returncode == 2
    assert "the processes cannot start together" in started.stderr


# Long enough for all signals, with dropout, whose masks have to be the same after a restart.
DISTURBED = {"train.epochs": 150.0, "evaluate.images": 0, "checkpoint.every": 20, "model.gpt2.dropout": 0.1}
DISTURBED_STEPS = 750


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_random_ends(data_dir: Path, tmp_path: Path, signum: signal.Signals, processes: int) -> None:
    """20 signals to any of the processes, at any time from the opening of the logs on; then it may end."""
    random = np.random.default_rng(processes)
    run, stops = tmp_path / "run", set()
    for _ in range(20):
        log = run / "metrics.jsonl"
        before = log.read_bytes() if log.exists() else b""
        started = start(*train(data_dir, run, **DISTURBED), "--lost_after=10", processes=processes, devices=2)
        while not log.exists() or log.read_bytes() == before:
            assert all(process.poll() is None for process in started), [process.communicate() for process in started]
            time.sleep(0.05)
        time.sleep(random.exponential(0.3))
        started[int(random.integers(processes))].send_signal(signum)
        printed = [process.communicate(timeout=300)[0] for process in started]
        if found := re.search(r"Stopped after step (\d+)", printed[0]):
            stops.add(int(found[1]))
            assert not any(process.returncode for process in started), printed
    if signum == signal.SIGTERM:
        assert stops
    ended(start(*train(data_dir, run, **DISTURBED), processes=processes, devices=2))
    ended(start(*train(data_dir, tmp_path / "undisturbed", **DISTURBED), processes=processes, devices=2))
    assert_same(saved(run, DISTURBED_STEPS), saved(tmp_path / "undisturbed", DISTURBED_STEPS))
    assert logged(run) == logged(tmp_path / "undisturbed")
