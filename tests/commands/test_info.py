import json
import shutil
from pathlib import Path

import jax
import pytest
from tiny import EMBEDDING_WIDTH, Clipcap

from clipcap_jax.captioning.captioner import Captioner


@pytest.fixture
def run(embeddings_run: Path, tmp_path: Path) -> Path:
    """With results, and the best checkpoint not the last."""
    run = shutil.copytree(embeddings_run, tmp_path / "run")
    (run / "checkpoints" / "100" / "metrics" / "metrics").write_text('{"CIDEr": 99.0}')
    results = run / "evaluations" / "both-test"
    results.mkdir(parents=True)
    (results / "scores.json").write_text('{"scores": {"Bleu_4": 0.25, "loss": null}}')
    return run


def test_what_a_checkpoint_is(clipcap: Clipcap, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clipcap("info", run) == 0
    printed = capsys.readouterr().out
    for line in (
        "Step: 100 of 200",
        "; best 100, by CIDEr",
        f"Reads: embeddings {EMBEDDING_WIDTH} wide, from mean colour",
        "Data: records/both",
        "Training: 40 epochs, batches of 8, learning rate 0.005 after 2 steps, seed 0",
        "Scores, validation: CIDEr 99.000",
        "Scores, both-test: Bleu_4 0.250",
    ):
        assert line in printed


def test_as_json(clipcap: Clipcap, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clipcap("info", run, "--json", "--checkpoint", "latest") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["total_steps"], found["best_step"]) == (200, 200, 100)
    assert found["config"] == json.loads((run / "config.json").read_text())["config"]
    params = Captioner.load(run).params
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert found["parameters"] == sizes
    assert found["evaluations"] == {"both-test": {"Bleu_4": 0.25, "loss": None}}


def test_mistakes(clipcap: Clipcap, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations" / "both-test" / "scores.json").write_text("[]")
    for arguments, message in (
        ((tmp_path / "gone",), "holds no checkpoints"),
        ((run, "--checkpoint=7"), "there is no checkpoint '7'"),
        ((run,), "holds a scores.json that evaluate did not write"),
    ):
        assert clipcap("info", *arguments) == 2
        assert message in capsys.readouterr().err
