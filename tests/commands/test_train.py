import json
import shutil
from pathlib import Path

import pytest
from tiny import Clipcap

from clipcap_jax import config, config_files
from clipcap_jax.captioning.captioner import Captioner


@pytest.fixture
def run(embeddings_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embeddings_run, tmp_path / "run")


def test_a_run_goes_on_with_its_own_settings(clipcap: Clipcap, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run / "config.json").read_text())
    assert stored["config"]["train"]["epochs"] == 40.0
    assert clipcap("train", f"--workdir={run}", "--config.train.log_every=7") == 0
    assert "Trained 200 steps" in capsys.readouterr().out
    changed = json.loads((run / "config.json").read_text())
    assert changed["config"]["train"].pop("log_every") == 7
    stored["config"]["train"].pop("log_every")
    assert changed == stored
    (run / "config.json").unlink()  # as of an older version: the checkpoint has them too
    assert clipcap("train", f"--workdir={run}") == 0
    assert (run / "config.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--config.train.seed=1", "config.train.seed was 0, is 1"),
        ("--config.train.epochs=39", "config.train.epochs was 40, is 39: a run that goes on can get more, not fewer"),
        ("--config.train.epoch=41", "config.train.epoch is not a setting: did you mean config.train.epochs?"),
    ],
)
def test_settings_that_a_run_cannot_go_on_with(
    clipcap: Clipcap, run: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.json").read_bytes()
    assert clipcap("train", f"--workdir={run}", setting) == 2
    assert message in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 6}', '{"format_version": 6, "config": {}}'])
def test_a_file_of_settings_that_cannot_be_read(
    clipcap: Clipcap, run: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.json").write_text(text)
    assert clipcap("train", f"--workdir={run}") == 2
    printed = capsys.readouterr().err
    assert f"Error: {run / 'config.json'}: " in printed
    assert "Mend it, or delete it" in printed


def test_some_hundred_pictures(
    clipcap: Clipcap, run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base and a data set are all that has to be named, and afterwards the base may go."""
    settings = [f"--config.data.data_dir={data_dir}", "--config.data.name=records/both", "--config.train.batch_size=8"]
    new = f"--workdir={tmp_path / 'new'}"
    assert clipcap("train", f"--config=finetune:{run}", new, *settings, "--config.train.epochs=1") == 0
    assert "Trained 5 steps" in capsys.readouterr().out
    base = Captioner.load(run)
    shutil.rmtree(run)
    tuned = Captioner.load(tmp_path / "new")
    assert tuned.metadata.config.model == base.metadata.config.model
    assert tuned.metadata.tokenizer.same_ids(base.metadata.tokenizer)
    assert tuned.metadata.config.train.init_from == str(run)
    assert clipcap("train", new, "--config.train.epochs=2") == 0
    assert "Going on after step 5 of 10, not of 5" in capsys.readouterr().out
    assert clipcap("train", f"--config=finetune:{run}", f"--workdir={tmp_path / 'third'}") == 2
    assert f"{run} is no run to start from" in capsys.readouterr().err


def test_what_finetuning_takes_from_its_base(embeddings_run: Path, pixels_run: Path) -> None:
    for base, reads in ((embeddings_run, "embedding"), (pixels_run, "image")):
        values = config.from_dict(config_files.read(f"finetune:{base}").to_dict())
        taken = Captioner.load(base).metadata.config
        assert values.model == taken.model
        assert (values.data.input, values.data.max_tokens) == (reads, taken.data.max_tokens)
        assert (values.tokenizer, values.evaluate.decode) == (taken.tokenizer, taken.evaluate.decode)


def test_what_it_does_not_take(clipcap: Clipcap, capsys: pytest.CaptureFixture[str]) -> None:
    assert clipcap("train", "--config=shapes", "--wokdir=x") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: clipcap train ")
    assert "unrecognized arguments: --wokdir=x" in printed
    assert clipcap("train", "--workdir=") == 2
    assert "--workdir is empty" in capsys.readouterr().err
    assert clipcap("train", "--config=shape") == 2
    assert "there is no config file shape; by their names there are coco_mlp, " in capsys.readouterr().err
