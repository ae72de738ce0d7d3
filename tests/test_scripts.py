"""`train.py` and `evaluate.py`, as a user starts them; `clipcap train` and `clipcap evaluate` are the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_files import write_clip
from tiny import ENCODER, Clipcap, Source

from clipcap_jax.captioning.batches import BatchCaptioner
from clipcap_jax.datasets import RecordsSource, prepare_records
from clipcap_jax.evaluation import evaluate
from clipcap_jax.metrics import SpiceConfig, unavailable

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}


def start(
    script: str, *arguments: str, environment: dict[str, str] = ENVIRONMENT, cwd: Path = ROOT
) -> subprocess.Popen[str]:
    command = [sys.executable, script if script == "-m" else str(ROOT / script), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What the process printed, once it has ended well."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    assert "Traceback" not in out + err
    return out + err


def test_train_then_evaluate(data_dir: Path, tmp_path: Path) -> None:
    flags = [f"--config={ROOT / 'tests' / 'tiny.py'}", f"--config.data.data_dir={data_dir}"]
    printed = finish(start("train.py", *flags, cwd=tmp_path))
    assert "validation loss" in printed
    assert "Trained 15 steps. The run is in runs/tiny" in printed
    printed = finish(start("evaluate.py", "--workdir=runs/tiny", "--split=val", cwd=tmp_path))
    [results] = (tmp_path / "runs" / "tiny" / "evaluations").iterdir()
    assert f"runs/tiny/evaluations/{results.name}" in printed
    assert (results / "page.html").exists()
    assert "Trained 15 steps" in finish(start("train.py", "--workdir=runs/tiny", cwd=tmp_path))  # nothing left


Evaluated = Callable[..., tuple[dict[str, Any], int, list[int]]]


@pytest.fixture
def evaluated(clipcap: Clipcap, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """What `clipcap evaluate` writes: scores.json and how many captions; how many pictures it captions at a time."""
    folders, sizes = [], []
    write, caption = evaluate.write, BatchCaptioner.__call__

    def write_noted(result: Any, captioner: Any, folder: Path, console: Any) -> None:
        folders.append(folder)
        write(result, captioner, folder, console)

    def caption_noted(self: BatchCaptioner, params: Any, inputs: np.ndarray) -> Any:
        sizes.append(len(inputs))
        return caption(self, params, inputs)

    monkeypatch.setattr(evaluate, "write", write_noted)
    monkeypatch.setattr(BatchCaptioner, "__call__", caption_noted)

    def evaluated(*arguments: str) -> tuple[dict[str, Any], int, list[int]]:
        folders.clear()
        sizes.clear()
        assert clipcap("evaluate", *arguments) == 0
        [folder] = folders
        scores = json.loads((folder / "scores.json").read_text())
        return {**scores, "folder": str(folder)}, len(json.loads((folder / "captions.json").read_text())), list(sizes)

    return evaluated


@pytest.fixture
def run(embeddings_run: Path, tmp_path: Path) -> Path:
    """A finished run whose best checkpoint, of step 100, is not its last, of step 200."""
    run = shutil.copytree(embeddings_run, tmp_path / "run")
    (run / "checkpoints" / "100" / "metrics" / "metrics").write_text('{"CIDEr": 99.0}')
    return run


def test_an_evaluation_as_the_run_was_configured(
    run: Path, clipcap: Clipcap, evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, captions, sizes = evaluated(f"--workdir={run}")
    assert scores["folder"] == f"{run}/evaluations/records-both-test-100-beam1"
    assert scores["details"]["checkpoint"] == "step 100"
    assert scores["details"]["decoding"] == "beam_size=1 max_tokens=16 length_penalty=1.0"
    assert (captions, sizes) == (6, [4, 4])
    assert "CLIPScore" not in scores["scores"]
    assert scores["not_computed"] == {"SPICE": "not asked for", **unavailable(meteor=True, spice=None)}

    path = Path(scores["folder"]) / "scores.json"
    path.write_text("{}")
    assert clipcap("evaluate", f"--workdir={run}", "--nometeor") == 2
    assert f"{path.parent} holds results: name another folder by --output, or replace" in capsys.readouterr().err
    assert path.read_text() == "{}"
    scores, *_ = evaluated(f"--workdir={run}", "--nometeor", "--overwrite")
    assert scores["not_computed"]["METEOR"] == "not asked for"


def test_every_option_of_an_evaluation(run: Path, evaluated: Evaluated, source: Source, tmp_path: Path) -> None:
    """Changes something that is seen."""
    captions, pictures, embeddings = map(str, (source.captions, source.pictures, source.embeddings))
    other = RecordsSource("other", captions, images=pictures, embeddings=embeddings, encoder=ENCODER)
    prepare_records(other, str(tmp_path / "data"))
    clip, jars = write_clip(tmp_path / "clip"), str(tmp_path / "jars")
    for name in ("vocab.json", "merges.txt"):
        (clip / name).rename(tmp_path / name)
    scores, count, sizes = evaluated(
        f"--workdir={run}",
        "--checkpoint=latest",
        "--data=records/other",
        f"--data_dir={tmp_path / 'data'}",
        "--split=test[:5]",
        "--beam_size=3",
        "--length_penalty=0.5",
        "--batch_size=8",
        "--nometeor",
        "--spice",
        f"--spice_jars={jars}",
        f"--clipscore={clip}",
        f"--clip_tokenizer={tmp_path}",
        f"--output={tmp_path / 'results'}",
    )
    assert scores["folder"] == str(tmp_path / "results")
    assert scores["details"]["checkpoint"] == "step 200"
    assert scores["details"]["data set"] == "records/other/test[:5]"
    assert scores["details"]["decoding"] == "beam_size=3 max_tokens=16 length_penalty=0.5"
    assert (count, sizes) == (5, [8])
    assert "CLIPScore" in scores["scores"]
    assert scores["not_computed"] == {
        "METEOR": "not asked for",
        **unavailable(meteor=False, spice=SpiceConfig(jars)),  # where there is Java, as there are no jars
    }


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
            "Error: config.train.epoch is not a setting: did you mean config.train.epochs?\n",
        ),
        ("train.py", ["--config=tests/tiny.py", "--config.train.epochs=many"], "many"),
        ("train.py", ["--config=configs/gone.py"], "configs/gone.py"),
        ("train.py", ["--config=tests/tiny.py", "--config.data.data_dir=/nowhere"], "not prepared in /nowhere"),
        ("train.py", ["--config=tests/tiny.py", "--config.train.batch_size=6"], "multiple of the 4 devices"),
        ("train.py", [], "holds no run to go on with: name by --config what to train there, such as coco_mlp, coco"),
        ("evaluate.py", ["--workdir=/nowhere"], "/nowhere holds no checkpoints"),
        ("evaluate.py", ["runs/x"], "unrecognized arguments: runs/x: the run's folder is --workdir=runs/x"),
        ("evaluate.py", ["--workdir=s3://bucket/run"], "s3://bucket/run: runs and their checkpoints lie on a disk"),
    ],
)
def test_mistakes(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    process = start(script, *arguments, *([f"--workdir={tmp_path}"] if script == "train.py" else []))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_the_demo_learns_to_name_the_shapes(tmp_path: Path) -> None:
    """What `make demo` runs, at its full size: two thirds of its test scenes are combinations that were never seen."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("JAX_", "XLA_"))}
    flags = ["--config=shapes", f"--workdir={tmp_path}", f"--config.data.data_dir={tmp_path}"]
    finish(start("train.py", *flags, environment=environment), timeout=1200)
    flags = [f"--workdir={tmp_path}", f"--output={tmp_path / 'results'}"]
    finish(start("evaluate.py", *flags, environment=environment))
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["scores"]
    assert len(json.loads((tmp_path / "results" / "captions.json").read_text())) == 1000
    assert scores["exact scenes"] >= 0.95
    assert scores["loss_permuted"] > 2 * scores["loss"]
