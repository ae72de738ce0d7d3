import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
from tiny import ENCODER, SPLITS, Clipcap, Source, get_config

import clipcap_jax
from clipcap_jax import datasets, jobs
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.commands import train
from clipcap_jax.errors import UserError


def test_from_files_to_scores(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook does it, in a thread that is not the main one."""
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    config = get_config()
    settings = {"data.name": "records/mine", "train.epochs": 1, "evaluate.every": 5}

    def work() -> None:
        mine = clipcap_jax.RecordsSource(
            "mine", str(source.captions), embeddings=str(source.embeddings), encoder=ENCODER
        )
        found["summary"] = clipcap_jax.prepare(mine)
        config.data.data_dir = "data"
        found["run"] = clipcap_jax.train(config, "runs/mine", settings)
        found["result"] = clipcap_jax.evaluate(found["run"], split="val", beam_size=2, meteor=False)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    jax.clear_caches()
    assert found["summary"].name == "records/mine"
    assert dict(found["summary"].images) == SPLITS
    assert found["run"] == Path("runs/mine")
    stored = json.loads((found["run"] / "config.json").read_text())["config"]
    assert (stored["train"]["epochs"], stored["evaluate"]["every"]) == (1.0, 5)
    assert config.train.epochs == 3.0  # not changed
    [folder] = (found["run"] / "evaluations").iterdir()
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert folder.name == "records-mine-val-5-beam2"
    assert found["result"].scores.overall["CIDEr"] == scores["CIDEr"]
    assert found["result"].loss == scores["loss"]
    assert len(found["result"].captions) == SPLITS["val"]


def test_several_processes_draw(
    clipcap: Clipcap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as there are CPUs for the command; one for a script, which may not be made for more."""
    drawn = mock.Mock(side_effect=UserError("the disk is full"))
    monkeypatch.setattr(datasets, "prepare_shapes", drawn)
    monkeypatch.setattr(train, "cpus", lambda: 7)
    assert (
        clipcap("train", f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}", "--config=shapes") == 2
    )
    assert "the disk is full" in capsys.readouterr().err
    with pytest.raises(UserError, match="the disk is full"):
        clipcap_jax.train("shapes", tmp_path / "run", {"data.data_dir": str(tmp_path)})
    assert drawn.mock_calls == [mock.call(str(tmp_path), processes=processes, beam=None) for processes in (7, 1)]
    with pytest.raises(UserError, match="processes is 0"):
        clipcap_jax.train("shapes", tmp_path / "run", {"data.data_dir": str(tmp_path)}, processes=0)


def test_a_run_goes_on(embeddings_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(embeddings_run, tmp_path / "run")
    assert clipcap_jax.train(workdir=run, settings={"train.log_every": 7}) == run
    assert json.loads((run / "config.json").read_text())["config"]["train"]["log_every"] == 7
    with pytest.raises(UserError, match=r"config.train.seed was 0, is 1"):
        clipcap_jax.train(workdir=str(run), settings={"train.seed": 1})


def test_results_are_not_replaced(embeddings_run: Path, tmp_path: Path) -> None:
    first = clipcap_jax.evaluate(embeddings_run, split="val", meteor=False, output=tmp_path / "results")
    with pytest.raises(jobs.HasResults) as error:
        clipcap_jax.evaluate(embeddings_run, split="val", meteor=False, output=tmp_path / "results")
    assert error.value.folder == tmp_path / "results"
    again = clipcap_jax.evaluate(
        embeddings_run, checkpoint=100, split="val", meteor=False, output=tmp_path / "results", overwrite=True
    )
    assert first is not None
    assert again is not None
    assert json.loads((tmp_path / "results" / "scores.json").read_text())["details"]["checkpoint"] == "step 100"
    assert first.scores.overall.keys() == again.scores.overall.keys()
    assert Captioner.load(embeddings_run).step != 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipcap_jax.train("gone", "run"), "there is no config file gone; by their names there are "),
        (lambda: clipcap_jax.train(), "name the run's folder, workdir, or a config that has a name: coco_mlp, "),
        (lambda: clipcap_jax.train(get_config()), "name the run's folder, workdir, or"),
        (lambda: clipcap_jax.train({"data": {}}, "run"), "config lacks "),
        (lambda: clipcap_jax.train("shapes", "run", {"config.train.epoch": 3}), "did you mean config.train.epochs?"),
        (lambda: clipcap_jax.train("shapes", "run", {"train.epochs": "three"}), "three"),
        (lambda: clipcap_jax.train("flickr8k", "run", {"model.clip": None, "data.name": "gone"}), "gone"),
        (lambda: clipcap_jax.train(workdir="gone"), "gone holds no run to go on with"),
        (lambda: clipcap_jax.evaluate("gone"), "gone holds no checkpoints"),
        (lambda: clipcap_jax.evaluate("gone", beam_size=0), "beam_size is 0"),
        (lambda: clipcap_jax.evaluate("gone", length_penalty=float("nan")), "length_penalty is nan"),
        (lambda: clipcap_jax.prepare("shape"), "there is no data set 'shape' to prepare: there are shapes, coco, "),
        (lambda: clipcap_jax.prepare("coco"), "coco is prepared from its owners' files: name the folder"),
        (
            lambda: clipcap_jax.prepare("cc3m", manual_dir="x", download=True),
            "download is of coco, flickr8k, flickr30k",
        ),
        (lambda: clipcap_jax.prepare("shapes", manual_dir="x"), "are of published data sets: coco, "),
        (lambda: clipcap_jax.prepare("shapes", processes=0), "processes is 0: it has to be a number from 1 on"),
        (lambda: clipcap_jax.prepare("shapes", max_skipped=5), "max_skipped is 5: it has to be a share from 0 to 1"),
    ],
)
def test_mistakes(call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())
