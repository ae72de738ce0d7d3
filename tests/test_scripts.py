"""`train.py` and `evaluate.py`, as the processes that a user starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}


def start(script: str, *arguments: str, environment: dict[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    command = [sys.executable, script, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What the process printed, once it has ended well."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    assert "Traceback" not in out + err
    return out + err


def test_train_then_evaluate(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--config=tests/tiny.py", f"--config.data.data_dir={data_dir}", f"--workdir={run}"]
    printed = finish(start("train.py", *flags))
    assert "validation loss" in printed
    assert "Trained 15 steps" in printed
    printed = finish(
        start("evaluate.py", f"--workdir={run}", "--checkpoint=latest", "--beam_size=3", "--split=test[:4]")
    )
    results = run / "evaluations" / "records-both-test[:4]-15-beam3"
    assert str(results) in printed
    assert len(json.loads((results / "captions.json").read_text())) == 4
    assert "beam_size=3" in json.loads((results / "scores.json").read_text())["details"]["decoding"]
    assert "Trained 15 steps" in finish(start("train.py", *flags))  # nothing left to do
    again = (
        "evaluate.py",
        f"--workdir={run}",
        "--checkpoint=latest",
        "--beam_size=3",
        "--split=test[:4]",
        "--nometeor",
    )
    out, err = (refused := start(*again)).communicate(timeout=300)
    assert refused.returncode == 2
    assert f"{results} holds results" in out + err
    finish(start(*again, "--overwrite"))


def test_evaluation_follows_a_run_that_goes_on(data_dir: Path, tmp_path: Path) -> None:
    flags = ["--config=tests/tiny.py", f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path}"]
    # It keeps them all, so that none goes while it is read: of that, tensorstore tells with tracebacks of its own.
    flags += [
        "--config.train.epochs=40",
        "--config.evaluate.every=40",
        "--config.checkpoint.every=40",
        "--config.checkpoint.keep=9",
    ]
    following = start("evaluate.py", f"--workdir={tmp_path}", "--follow", "--split=val", "--nometeor")
    finish(start("train.py", *flags))
    printed = finish(following)
    scored = [int(step) for step in re.findall(r"─ step (\d+) ─", printed)]
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert scored == saved
    assert scored[-1] == 200
    assert (tmp_path / "evaluations" / "records-both-val-200-beam1" / "page.html").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train.py",
            ["--config=tests/tiny.py", "--config.train.epoch=3"],
            "no setting 'epoch'\nDid you mean \"epochs\"",
        ),
        ("train.py", ["--config=tests/tiny.py", "--config.train.epochs=many"], "many"),
        ("train.py", ["--config=configs/gone.py"], "configs/gone.py"),
        ("train.py", ["--config=tests/tiny.py", "--config.data.data_dir=/nowhere"], "not prepared in /nowhere"),
        ("train.py", ["--config=tests/tiny.py", "--config.train.batch_size=6"], "multiple of the 4 devices"),
        ("evaluate.py", ["--workdir=/nowhere"], "/nowhere holds no checkpoints"),
        ("evaluate.py", ["runs/x"], "runs/x: only flags are taken, such as --workdir=runs/x"),
        ("evaluate.py", ["--workdir=s3://bucket/run"], "s3://bucket/run: runs and their checkpoints lie on a disk"),
    ],
)
def test_mistakes(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    process = start(script, *arguments, *([f"--workdir={tmp_path}"] if script == "train.py" else []))
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert message in out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_the_demo_learns_to_name_the_shapes(tmp_path: Path) -> None:
    """What `make demo` runs, at its full size: two thirds of its test scenes are combinations that were never seen."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("JAX_", "XLA_"))}
    flags = [f"--workdir={tmp_path}", f"--config.data.data_dir={tmp_path}"]
    finish(start("train.py", *flags, environment=environment), timeout=1200)
    flags = [f"--workdir={tmp_path}", f"--output={tmp_path / 'results'}"]
    finish(start("evaluate.py", *flags, environment=environment))
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["scores"]
    assert len(json.loads((tmp_path / "results" / "captions.json").read_text())) == 1000
    assert scores["exact scenes"] >= 0.95
    assert scores["loss_permuted"] > 2 * scores["loss"]
