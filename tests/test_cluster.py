"""Several processes of one machine, as several hosts: they train and evaluate as one would."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import assert_close, assert_same, saved

ROOT = Path(__file__).parents[1]
STEPS = 15


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def start(script: str, *flags: str, processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """Start as many processes of a script, with as many devices each."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    cluster = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / script),
                *flags,
                *([*cluster, f"--process_id={index}"] if processes > 1 else []),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def ended(started: Sequence[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What they print until they end, each with this code."""
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n".join(printed)
    return printed


def settings(data_dir: Path, run: Path, **changes: object) -> list[str]:
    """Flags of a tiny run without dropout, which differs by device."""
    values = {"data.data_dir": data_dir, "model.gpt2.dropout": 0.0, "model.gpt2.word_dropout": 0.0, **changes}
    return [
        f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--workdir={run}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


@pytest.fixture(scope="module")
def alone(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with four devices."""
    run = tmp_path_factory.mktemp("alone")
    ended(start("train.py", *settings(data_dir, run, **{"optimizer.epsilon": 1e-3}), processes=1, devices=4))
    return run


def test_two_processes_train_and_evaluate_as_one(data_dir: Path, alone: Path, tmp_path: Path) -> None:
    flags = settings(data_dir, tmp_path, **{"optimizer.epsilon": 1e-3})
    first, second = ended(start("train.py", *flags, processes=2, devices=2))
    assert f"Trained {STEPS} steps" in first
    assert all(line.startswith("[Gloo]") for line in second.splitlines())
    assert_close(saved(tmp_path, STEPS), saved(alone, STEPS))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len((alone / "metrics.jsonl").read_text().splitlines())
    for run, processes in ((alone, 1), (tmp_path, 2)):
        flags = [f"--workdir={run}", "--split=test", "--checkpoint=latest", "--nometeor"]
        ended(start("evaluate.py", *flags, processes=processes, devices=4 // processes))
    one, two = (
        json.loads((run / "evaluations" / f"test-{STEPS}" / "captions.json").read_text()) for run in (alone, tmp_path)
    )
    assert one == two


def steps_logged(run: Path, started: Sequence[subprocess.Popen[str]], count: int) -> None:
    """Wait until a run has logged as many steps."""
    log = run / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in started), [process.communicate()[0] for process in started]
        time.sleep(0.1)


# For as long as a test needs.
LONG = {"train.epochs": 10000.0, "evaluate.images": 0, "checkpoint.every": 100}


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed(data_dir: Path, tmp_path: Path, killed: int) -> None:
    started = start("train.py", *settings(data_dir, tmp_path, **LONG), "--lost_after=10", processes=2, devices=1)
    steps_logged(tmp_path, started, 5)
    started[killed].kill()
    printed = [process.communicate(timeout=300)[0] for process in started][1 - killed]
    assert started[1 - killed].returncode not in (None, 0)
    if killed == 1:
        assert "process 1 of 2 was lost: it was not heard of for 10 s" in printed
    else:  # whose end JAX does not survive
        assert "Process 1 of 2 was ended from outside" in printed
        assert "process 0 was lost" in printed
    assert "The same command goes on from the last checkpoint" in printed


@pytest.mark.parametrize("failing", [0, 1])
def test_the_disk_of_one_is_full(data_dir: Path, tmp_path: Path, failing: int) -> None:
    """In the sharded layout each process writes its part of a checkpoint, elsewhere the first one all."""
    flags = settings(data_dir, tmp_path, **LONG, **{"checkpoint.keep": 2, "parallel.layout": "fsdp"})
    started = start("train.py", *flags, processes=2, devices=1)
    steps_logged(tmp_path, started, 5)
    resource.prlimit(started[failing].pid, resource.RLIMIT_FSIZE, (2000, 2000))
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 2 for process in started), printed
    assert all("Make room" in text or "make room" in text for text in printed), printed
    assert f"process {failing} of 2: " in printed[1 - failing]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(data_dir: Path, tmp_path: Path) -> None:
    flags = settings(
        data_dir, tmp_path / "stopped", **{"train.epochs": 60.0, "evaluate.images": 0, "checkpoint.every": 1000}
    )
    started = start("train.py", *flags, processes=2, devices=2)
    steps_logged(tmp_path / "stopped", started, 5)
    started[1].send_signal(signal.SIGTERM)
    first, _ = ended(started)
    assert "The same command goes on from there" in first
    first, _ = ended(start("train.py", *flags, processes=2, devices=2))
    assert "Going on after step" in first
    ended(
        start(
            "train.py",
            *settings(
                data_dir, tmp_path / "whole", **{"train.epochs": 60.0, "evaluate.images": 0, "checkpoint.every": 1000}
            ),
            processes=2,
            devices=2,
        )
    )
    assert_same(saved(tmp_path / "stopped", 300), saved(tmp_path / "whole", 300))


def test_fewer_than_said(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--num_processes=2"], capture_output=True, text=True, timeout=300
    )
    assert started.returncode == 2
    assert "the processes cannot start together" in started.stderr
