import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_models import random_params
from rich.console import Console
from tiny import ENCODER, Source, assert_close, assert_same, in_process, make_config, named, saved, train, train_until

from clipcap_jax import files, parallel
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.store import Checkpoints
from clipcap_jax.config import Config
from clipcap_jax.convert.gpt2 import load_gpt2, save_gpt2
from clipcap_jax.datasets import RecordsSource, prepare_records
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.models.gpt2 import Gpt2
from clipcap_jax.training import optim
from clipcap_jax.training.logs import Monitor
from clipcap_jax.training.start import choose_tokenizer
from clipcap_jax.training.step import TrainState

STEPS = 10  # of two epochs
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def unstopped(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, with a checkpoint after every step."""
    run = tmp_path_factory.mktemp("unstopped")
    train(run, settings(data_dir, {"checkpoint.every": 1, "checkpoint.keep": 100}))
    return run


def settings(data_dir: Path, changes: dict[str, Any] | None = None) -> Config:
    """Two epochs, with checkpoints after 4, 6, 8 and 10 steps, the second and the last with a validation."""
    return make_config(data_dir, {"train.epochs": 2.0, **(changes or {})})


def logged(run: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, without what the clock said."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/pairs_per_second"} for line in lines]


def assert_ends_like(run: Path, unstopped: Path) -> None:
    assert_same(saved(run, STEPS), saved(unstopped, STEPS))
    assert logged(run) == logged(unstopped)
    assert [line["step"] for line in logged(run) if "val/loss" in line] == [6, 10]
    assert [line["step"] for line in logged(run) if "train/loss" in line] == [*range(1, STEPS + 1)]


def steps(run: Path) -> list[int]:
    """The steps of the finished checkpoints, by their folders."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("run", ["embeddings_run", "pixels_run"])
def test_training_learns_to_say_what_its_pictures_show(run: str, request: pytest.FixtureRequest) -> None:
    """Most captions are one of those that the picture was shown with, and nearly all begin with its colour."""
    captioner = Captioner.load(request.getfixturevalue(run), "latest")
    config = captioner.metadata.config.data
    data = CaptionData(open_split(config.name, "train", config.data_dir), captioner.image_size)
    captions = captioner.generate.all(captioner.params, data, np.arange(len(data)), batch_size=32)
    found = [(caption.text, texts) for caption, texts in zip(captions, data.captions, strict=True)]
    assert np.mean([text in texts for text, texts in found]) > 0.5, found
    assert np.mean([text.split()[:1] == texts[0].split()[:1] for text, texts in found]) > 0.9, found


@pytest.fixture
def attentive() -> Iterator[None]:
    """Signals reach the test that nohup, or a shell that starts it in the background, would have it ignore."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_stopping_after_any_step_and_going_on_gives_the_same_bits(
    unstopped: Path, data_dir: Path, tmp_path: Path, attentive: None
) -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = list(map(signal.getsignal, signals))
    for step in range(1, STEPS):
        signum = signals[step % 3]
        workers = {"data.workers": step % 3}  # these may change
        printed = train_until(tmp_path, settings(data_dir, workers), step, signum)
        assert "Stopping after the step that is under way" in printed
        assert f"Stopped after step {step} of {STEPS}." in printed
        assert ("Going on after step" in printed) == (step > 1)
        assert_same(saved(tmp_path, step), saved(unstopped, step))
    assert list(map(signal.getsignal, signals)) == handlers
    train(tmp_path, settings(data_dir))
    assert_ends_like(tmp_path, unstopped)


def test_lines_of_the_log(data_dir: Path, tmp_path: Path) -> None:
    """Every `log_every` steps; a run shorter than ten times as many has one for each tenth. A stop changes none."""
    long = settings(data_dir, {"train.epochs": 8.0, "train.log_every": 3, "evaluate.every": 100})
    short = dataclasses.replace(long, train=dataclasses.replace(long.train, log_every=100))
    train_until(tmp_path / "whole", long, 13)
    train_until(tmp_path / "stopped", long, 7)
    train_until(tmp_path / "stopped", long, 13)
    assert [line["step"] for line in logged(tmp_path / "whole")] == [3, 6, 9, 12]
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    train_until(tmp_path / "short", short, 13)
    assert [line["step"] for line in logged(tmp_path / "short")] == [4, 8, 12]


def rates(run: Path) -> list[float]:
    """The learning rate of each step, from the first line of the log on."""
    return [line["train/learning_rate"] for line in logged(run) if "train/loss" in line]


def test_more_epochs_than_first_asked(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    """From the step where it is, a run of 10 steps, 2 of them of warm-up, has the rate of one of 20; by hand."""
    shutil.copytree(unstopped, tmp_path / "finished")
    longer = settings(data_dir, {"train.epochs": 4.0})
    printed = train(tmp_path / "finished", longer)
    assert (
        "Going on after step 10 of 20, not of 10 as until now: the learning rate goes from 0 to 0.0028, where a run of "
        "20 steps has it at this step, and falls to 0 at the new end.\n"
    ) in printed
    assert "Trained 20 steps" in printed
    before = [0, 0.0025, *(0.005 * (10 - step) / 8 for step in range(2, 10))]
    after = [0.005 * (20 - step) / 18 for step in range(10, 20)]
    assert rates(tmp_path / "finished") == pytest.approx([*before, *after], rel=1e-5)
    # Once it has a checkpoint, it is a run of 20 steps.
    train_until(tmp_path / "stopped", settings(data_dir), 5)
    assert "from 0.0031 to 0.0042," in train_until(tmp_path / "stopped", longer, 7)
    assert "Going on after step 7 of 20.\n" in train(tmp_path / "stopped", longer)
    after = [0.005 * (20 - step) / 18 for step in range(5, 20)]
    assert rates(tmp_path / "stopped") == pytest.approx([*before[:5], *after], rel=1e-5)


def test_fewer_epochs_than_first_asked(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(unstopped, tmp_path / "finished")
    with pytest.raises(
        UserError, match=r"config.train.epochs was 2, is 1.4: a run that goes on can get more, not fewer"
    ):
        train(tmp_path / "finished", settings(data_dir, {"train.epochs": 1.4}))
    assert_ends_like(tmp_path / "finished", unstopped)


def test_a_run_that_only_warms_up_is_told(data_dir: Path, tmp_path: Path) -> None:
    changes = {"train.epochs": 0.4, "optimizer.warmup_steps": 9}
    message = "warmup_steps=9 is not shorter than the run, 2 steps, so .* --config.optimizer.warmup_steps=0\n"
    assert re.search(message, train(tmp_path / "warm", settings(data_dir, changes)))
    printed = train(tmp_path / "warm", settings(data_dir, {**changes, "train.epochs": 0.6}))  # and goes on to
    assert re.search(r"not shorter than the run, 3 steps, so .* Train for more epochs\.\n", printed)
    assert re.search(r"Going on after step 2 of 3, not of 2 as until now: .* has it at this step\.\n", printed)
    assert "warmup_steps" not in train(tmp_path / "cold", settings(data_dir, {**changes, "optimizer.warmup_steps": 1}))


def test_averages_of_the_parameters(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    """They are what is saved, beside what training goes on with, which is as without them."""
    averaging = settings(data_dir, {"optimizer.average_decay": 0.9})
    train(tmp_path / "whole", averaging)
    train_until(tmp_path / "stopped", averaging, 5)
    train(tmp_path / "stopped", averaging)
    found, plain = saved(tmp_path / "whole", STEPS), saved(unstopped, STEPS)
    assert_same(saved(tmp_path / "stopped", STEPS), found)
    params = [name.removeprefix("params.") for name in plain if name.startswith("params.")]
    for name in params:
        np.testing.assert_array_equal(found[f"unaveraged.{name}"], plain[f"params.{name}"])
    assert any(np.any(found[f"params.{name}"] != plain[f"params.{name}"]) for name in params)
    assert Captioner.load(tmp_path / "whole", "latest").metadata.config == averaging
    assert len(logged(tmp_path / "whole")) == len(logged(unstopped))


def write_as_format_4(run: Path, step: int) -> None:
    """Write a checkpoint, of a run that keeps averages, as the versions before format 5 did."""

    class AverageState(NamedTuple):
        steps: np.ndarray
        average: Any

    with store.opened(run) as checkpoints:
        params, metadata = checkpoints.params(step), checkpoints.metadata(step)
        trained = {name: params[name] for name in metadata.config.train.trainable}
        state = optim.optimizer(metadata.config.optimizer, STEPS).init(trained)
        stored = checkpoints.restore(step, trained, state, averages=True)
    raw = {name: stored.params[name] for name in trained}
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "frozen")
    items = {
        "params": ocp.args.StandardSave(params),
        "optimizer": ocp.args.StandardSave((stored.optimizer, AverageState(np.array(step, np.int32), raw))),
        "position": ocp.args.JsonSave({**stored.position, "key": [0, 0]}),
        "metadata": ocp.args.JsonSave({**metadata.to_dict(), "format_version": 4}),
    }
    with ocp.CheckpointManager(run / "checkpoints", item_names=tuple(items)) as manager:
        manager.save(step, args=ocp.args.Composite(**items))


def test_a_run_of_format_4_goes_on_and_captions(data_dir: Path, tmp_path: Path) -> None:
    changes = {"optimizer.average_decay": 0.9, "train.trainable": ("mapper",)}
    averaging = settings(data_dir, changes)
    train(tmp_path / "whole", averaging)
    train_until(tmp_path / "old", averaging, 5)
    embeddings = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    before = [caption.text for caption in Captioner.load(tmp_path / "old", "5").caption(embeddings)]
    write_as_format_4(tmp_path / "old", 5)
    assert [caption.text for caption in Captioner.load(tmp_path / "old", "5").caption(embeddings)] == before
    assert "Going on after step 5" in train(tmp_path / "old", averaging)
    assert_same(saved(tmp_path / "old", STEPS), saved(tmp_path / "whole", STEPS))


@pytest.mark.parametrize("damage", ["params", "optimizer", "metadata/metadata"])
def test_a_damaged_checkpoint_is_set_aside(unstopped: Path, data_dir: Path, tmp_path: Path, damage: str) -> None:
    """The one before is used, and nothing is deleted."""
    train_until(tmp_path, settings(data_dir), 7)
    path = tmp_path / "checkpoints" / "7" / damage
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text("{")
    printed = train(tmp_path, settings(data_dir))
    assert re.search(rf"Warning: the checkpoint {tmp_path}/checkpoints/7 is gone or not whole", printed)
    assert "Going on after step 6" in printed
    assert_ends_like(tmp_path, unstopped)
    assert [path.name for path in tmp_path.glob("damaged-*/metadata")] == ["metadata"]
    for step in steps(tmp_path):  # none is left that is whole
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match=f"the checkpoint {tmp_path}/checkpoints/{STEPS} is gone or not whole"):
        train(tmp_path, settings(data_dir))


def test_what_is_frozen_is_written_once(data_dir: Path, tmp_path: Path) -> None:
    config = settings(data_dir, {"train.trainable": ("mapper",)})
    train(tmp_path, config)
    written = (tmp_path / "frozen").stat().st_mtime_ns
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_names=("params",)) as manager:
        assert [*manager.restore(STEPS, args=ocp.args.Composite(params=ocp.args.StandardRestore()))["params"]] == [
            "mapper"
        ]
    assert f"Going on after step {STEPS}" in train(tmp_path, config)
    assert (tmp_path / "frozen").stat().st_mtime_ns == written
    assert {*Captioner.load(tmp_path, "latest").params} == {"mapper", "gpt2"}
    (tmp_path / "frozen").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="frozen is missing, which holds gpt2: copy it as well"):
        Captioner.load(tmp_path, "latest")


def test_a_killed_run_goes_on_from_its_last_checkpoint(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenProcessPool):
        in_process(train_until, tmp_path, settings(data_dir), 9, signal.SIGKILL)
    assert steps(tmp_path)[:2] == [4, 6]  # that of step 8 may still have been written
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "val/lo')  # what is left of a line when the kill comes while it is written
    assert f"Going on after step {steps(tmp_path)[-1]}" in train(tmp_path, settings(data_dir))
    assert_ends_like(tmp_path, unstopped)


def train_until_saving(run: Path, config: Config, step: int) -> None:
    """Train, and be killed when all of a checkpoint is written, but before it gets its name."""

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]) == str(run / "checkpoints" / str(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    train(run, config)


def test_killed_while_saving(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenProcessPool):
        in_process(train_until_saving, tmp_path, settings(data_dir), 8)
    assert steps(tmp_path) == [4, 6]
    assert any(path.name.startswith("8.") for path in (tmp_path / "checkpoints").iterdir())
    assert "Going on after step 6" in train(tmp_path, settings(data_dir))
    assert_ends_like(tmp_path, unstopped)
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_a_signal_while_saving_stops_after_the_next_step(data_dir: Path, tmp_path: Path) -> None:
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, **items: Any) -> None:
        save(self, step, **items)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Checkpoints, "save", save_and_stop):
        assert "Stopped after step 5" in train(tmp_path, settings(data_dir))
    assert steps(tmp_path) == [4, 5]


def test_an_ignored_signal_stops_nothing(data_dir: Path, tmp_path: Path, attentive: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert f"Trained {STEPS} steps" in train_until(tmp_path, settings(data_dir), 3, signal.SIGHUP)


def test_one_training_in_a_folder(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with files.locked(run / ".lock"), pytest.raises(UserError, match=f"another process is training in {run}"):
        in_process(train, run, settings(data_dir))
    assert [path.name for path in run.iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written: File exists"):
        train(tmp_path / "file", settings(data_dir))


def test_a_part_that_stays_random_is_told(data_dir: Path, unstopped: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train.trainable": ("mapper",), "train.epochs": 0.2}
    assert "Warning: gpt2 will stay random" in train(tmp_path / "run", settings(data_dir, changes))
    changes["train.init_from"] = str(unstopped)
    assert "stay random" not in train(tmp_path / "other", settings(data_dir, changes))
    assert "stay random" not in train(tmp_path / "whole", settings(data_dir, {"train.epochs": 0.2}))


def test_a_second_interrupt_does_not_wait(unstopped: Path, data_dir: Path, tmp_path: Path, attentive: None) -> None:
    push = Monitor.push

    def push_and_interrupt(self: Monitor, step: int, metrics: Any) -> None:
        push(self, step, metrics)
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with mock.patch.object(Monitor, "push", push_and_interrupt), pytest.raises(KeyboardInterrupt):
        train(tmp_path, settings(data_dir))
    assert steps(tmp_path) == [4]
    train(tmp_path, settings(data_dir))
    assert_ends_like(tmp_path, unstopped)


@pytest.mark.slow
def test_pictures_come_back_in_order_too(data_dir: Path, tmp_path: Path) -> None:
    config = make_config(data_dir, {"checkpoint.every": 1, "checkpoint.keep": 100}, "pixels")
    train(tmp_path / "unstopped", config)
    for step in (1, 6, 11):
        train_until(tmp_path / "stopped", config, step)
    train(tmp_path / "stopped", config)
    for step in range(1, 16):
        assert_same(saved(tmp_path / "stopped", step), saved(tmp_path / "unstopped", step))
    assert logged(tmp_path / "stopped") == logged(tmp_path / "unstopped")


def captions(run: Path, config: Config, embeddings: np.ndarray) -> tuple[list[str], list[float]]:
    """Train, then caption embeddings: texts and scores."""
    train(run, config)
    found = list(Captioner.load(run, "latest").caption(embeddings, batch_size=12))
    return [caption.text for caption in found], [caption.score for caption in found]


def test_one_device_learns_what_four_learn(data_dir: Path, tmp_path: Path) -> None:
    # Without dropout, which differs by device; and with an epsilon that keeps Adam from blowing up the rounding errors
    # of gradients that would be 0 without them, as those of the keys' biases.
    without = {"model.gpt2.dropout": 0.0, "model.gpt2.word_dropout": 0.0}
    config = settings(data_dir, {**without, "optimizer.epsilon": 1e-3, "evaluate.images": 0})
    embeddings = np.random.default_rng(0).normal(scale=20, size=(30, 5))  # far apart, and so are their captions
    texts, scores = captions(tmp_path / "four", config, embeddings)
    other_texts, other_scores = in_process(captions, tmp_path / "one", config, embeddings, devices=1)
    assert texts == other_texts
    assert len(set(texts)) > 3
    np.testing.assert_allclose(scores, other_scores, rtol=1e-5)
    assert_close(saved(tmp_path / "one", STEPS), saved(tmp_path / "four", STEPS))
    for one, four in zip(logged(tmp_path / "one"), logged(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, rel=1e-5)


def initial(config: Config, inputs: np.ndarray) -> dict[str, Any]:
    """Fresh parameters."""
    init = parallel.once(ClipCap(config.model).init)  # by whose compiler's level the last bits are
    params = init(jax.random.key(0), inputs, np.zeros((1, 1), np.int32))["params"]
    return named({"params": jax.device_get(params)})


def assert_only_learnt(part: str, last: dict[str, Any], first: dict[str, Any]) -> None:
    """All arrays of the part have changed, no other has changed by a bit, and the optimiser knows of no other."""
    for name in first:
        changed = not np.array_equal(last[name], first[name])
        assert changed == name.startswith(f"params.{part}."), name
    assert {name.split(".mu.")[1].split(".")[0] for name in last if ".mu." in name} == {part}


TWO_STEPS = {"train.epochs": 0.4, "evaluate.images": 0}  # the first of which has a learning rate of 0


@pytest.mark.parametrize("part", ["mapper", "gpt2"])
def test_only_what_is_trainable_changes(data_dir: Path, tmp_path: Path, part: str) -> None:
    runs = {}
    for dropout in (0.0, 0.5):
        changes = {**TWO_STEPS, "train.trainable": (part,), "model.gpt2.dropout": dropout}
        printed = train(tmp_path / str(dropout), settings(data_dir, changes))
        assert re.search(rf"Model: {part} \S+M \(trained\), \w+ \S+M \(frozen\)", printed)
        runs[dropout] = saved(tmp_path / str(dropout), 2)
        assert_only_learnt(part, runs[dropout], initial(settings(data_dir, changes), np.zeros((1, 5), np.float16)))
    if part == "mapper":  # a frozen GPT-2 has no dropout
        assert_same(runs[0.0], runs[0.5])
    else:
        with pytest.raises(AssertionError):
            assert_same(runs[0.0], runs[0.5])


@pytest.mark.parametrize("part", ["clip", "mapper"])
def test_a_tower_changes_when_it_is_trainable(data_dir: Path, tmp_path: Path, part: str) -> None:
    config = make_config(data_dir, {**TWO_STEPS, "train.trainable": (part,)}, "pixels")
    train(tmp_path, config)
    assert_only_learnt(part, saved(tmp_path, 2), initial(config, np.zeros((1, 16, 16, 3), np.uint8)))


@pytest.mark.parametrize("bad", [7, 8])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(
    unstopped: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    map_step = parallel.map_step

    def map_poisoned(step: Callable[..., Any], devices: Any) -> Callable[..., Any]:
        take_step = map_step(step, devices)

        class Poisoned:
            begin = take_step.begin

            def __call__(self, state: TrainState, frozen: Any, batch: Any) -> Any:
                if state.step == bad - 1:
                    batch = {**batch, "inputs": batch["inputs"] * np.float16(np.nan)}
                return take_step(state, frozen, batch)

        return Poisoned()

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "map_step", map_poisoned)
        with pytest.raises(UserError, match=rf"the loss of step {bad} is nan\. .*learning_rate"):
            train(tmp_path, settings(data_dir))
    assert steps(tmp_path) == [4, 6]
    assert_same(saved(tmp_path, 6), saved(unstopped, 6))
    train(tmp_path, settings(data_dir))
    assert_ends_like(tmp_path, unstopped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rate": 1e-2}, "config.optimizer.learning_rate was 0.005, is 0.01"),
        ({"model.gpt2.layers": 3}, "config.model.gpt2.layers was 2, is 3"),
        ({"train.trainable": ("mapper",)}, r"config.train.trainable was \('mapper', 'gpt2'\), is \('mapper',\)"),
        ({"data.name": "records/embeddings"}, "config.data.name was 'records/both', is 'records/embeddings'"),
        (
            {"train.batch_size": 4, "train.seed": 1},
            r"config.train.seed was 0, is 1\n +config.train.batch_size was 8, is 4",
        ),
    ],
)
def test_a_run_of_other_settings_is_told_apart(
    unstopped: Path, data_dir: Path, changes: dict[str, Any], message: str
) -> None:
    before = saved(unstopped, STEPS)
    with pytest.raises(UserError, match=message):
        train(unstopped, settings(data_dir, changes))
    assert_same(saved(unstopped, STEPS), before)


@pytest.mark.parametrize("older", [False, True])
def test_a_data_set_that_has_changed(
    unstopped: Path, source: Source, data_dir: Path, tmp_path: Path, older: bool
) -> None:
    """By one caption; an older version's checkpoint does not tell more than how many steps an epoch of it had."""
    run = shutil.copytree(unstopped, tmp_path / "run")
    lines = [json.loads(line) for line in source.captions.read_text().splitlines()]
    line = next(line for line in lines if line["split"] == "train")
    if older:
        position = run / "checkpoints" / str(STEPS) / "position" / "metadata"
        position.write_text(json.dumps({**json.loads(position.read_text()), "fingerprint": None}))
        line["captions"] *= 9
    else:
        line["captions"][0] += " indeed"
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    captions, pictures, embeddings = map(str, (tmp_path / "captions.jsonl", source.pictures, source.embeddings))
    both = RecordsSource("both", captions, images=pictures, embeddings=embeddings, encoder=ENCODER, store_images=True)
    prepare_records(both, str(tmp_path))
    message = f"10 steps, and now there are {'1[2-4], of the same' if older else '10, of other'} data"
    with pytest.raises(UserError, match=f"records/both/train is not what it was: .* {message}"):
        train(run, settings(tmp_path))
    assert f"Going on after step {STEPS} of {STEPS}" in train(run, settings(data_dir))


def test_another_run_to_start_from(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(unstopped, base)
    (base / "checkpoints" / "6" / "metrics" / "metrics").write_text('{"CIDEr": 9.0}')  # the best, but not the newest
    config = settings(data_dir, {"train.init_from": str(base)})
    train_until(run, config, 1)  # whose learning rate is 0
    first, best = saved(run, 1), saved(unstopped, 6)
    assert_same(
        {name: first[name] for name in first if name.startswith("params.")},
        {name: best[name] for name in best if name.startswith("params.")},
    )
    counts = {int(first[name]) for name in first if name.startswith("optimizer.") and name.endswith("count")}
    assert counts == {1}
    # A run that goes on does not start again.
    assert "Going on after step 1" in train_until(run, config, 2)


@pytest.fixture
def pretrained(data_dir: Path, tmp_path: Path) -> Path:
    """A GPT-2 of the size that the settings have, with its tokenizer."""
    config = settings(data_dir)
    captions = CaptionData(open_split("records/both", "train", str(data_dir)), None).captions
    tokenizer = choose_tokenizer(config, None, captions)
    module = Gpt2(config.model.gpt2, jnp.dtype("float32"))
    params = random_params(module, 3, np.zeros((1, 1, config.model.gpt2.width), np.float32))
    save_gpt2(config.model.gpt2, params, tokenizer, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_pretrained_language_model(data_dir: Path, pretrained: Path, tmp_path: Path) -> None:
    changes = {"train.pretrained.gpt2": str(pretrained), "tokenizer.source": str(pretrained)}
    train_until(tmp_path / "run", settings(data_dir, changes), 1)  # whose learning rate is 0
    found = saved(tmp_path / "run", 1)
    expected = {f"params.gpt2.{name}": leaf for name, leaf in named(load_gpt2(str(pretrained))[1]).items()}
    assert_same({name: found[name] for name in found if name.startswith("params.gpt2.")}, expected)
    # A run that goes on has its own.
    (pretrained / "model.safetensors").unlink()
    assert "Going on after step 1" in train_until(tmp_path / "run", settings(data_dir, changes), 2)


def test_a_pretrained_language_model_of_another_size(data_dir: Path, pretrained: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train.pretrained.gpt2": str(pretrained), "tokenizer.source": str(pretrained)}
    with pytest.raises(UserError, match=r"is Gpt2Config\(.* layers=2,.*\), but config.model.gpt2 is .* layers=1,"):
        train(tmp_path, settings(data_dir, {**changes, "model.gpt2.layers": 1}))
    with pytest.raises(UserError, match=r"is Gpt2Config\(.* heads=2,.*\), but config.model.gpt2 is .* heads=4,"):
        train(tmp_path, settings(data_dir, {**changes, "model.gpt2.heads": 4}))


def test_a_base_of_another_architecture(unstopped: Path, data_dir: Path, tmp_path: Path) -> None:
    config = settings(data_dir, {"train.init_from": str(unstopped), "model.mapper.prefix_length": 3})
    message = (
        r"is a checkpoint of another architecture. \d parameters differ, the first ones:\n"
        r"  mapper.in.bias: \(32,\), where the config makes \(48,\)\n"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path, config)
    with pytest.raises(UserError, match="nowhere holds no checkpoints"):
        train(tmp_path, settings(data_dir, {"train.init_from": "/nowhere"}))


def test_a_base_of_other_embeddings(unstopped: Path, source: Source, tmp_path: Path) -> None:
    other = RecordsSource("other", str(source.captions), embeddings=str(source.embeddings), encoder="RN50")
    prepare_records(other, str(tmp_path))
    message = (
        f"records/other/train holds embeddings from RN50, but {unstopped} was trained on embeddings from {ENCODER}"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", settings(tmp_path, {"train.init_from": str(unstopped), "data.name": "records/other"}))


def test_a_data_set_that_is_not_there_leaves_no_folder(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'records/nothing' is not prepared"):
        train(tmp_path / "run", settings(data_dir, {"data.name": "records/nothing"}))
    assert not list(tmp_path.iterdir())


def test_a_data_set_without_validation_pictures(source: Source, tmp_path: Path) -> None:
    given = RecordsSource("alone", str(source.captions), embeddings=str(source.embeddings), split="train")
    lines = [json.loads(line) for line in source.captions.read_text().splitlines()]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({**line, "split": ""}) + "\n" for line in lines))
    prepare_records(dataclasses.replace(given, captions=str(captions)), str(tmp_path))
    changes: dict[str, Any] = {"data.name": "records/alone", "train.epochs": 0.2}
    with pytest.raises(UserError, match=r"records/alone has no split 'val' .*--config.evaluate.images=0"):
        train(tmp_path / "run", settings(tmp_path, changes))
    assert not (tmp_path / "run").exists()
    assert "Trained" in train(tmp_path / "run", settings(tmp_path, changes | {"evaluate.images": 0}))


def test_a_batch_that_does_not_divide(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.train.batch_size is 6: it has to be a multiple of the 4 devices"):
        train(tmp_path, settings(data_dir, {"train.batch_size": 6}))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_on_other_devices(data_dir: Path, tmp_path: Path) -> None:
    """Replicated, sharded over four devices and over two, replicated again: as if it had not been stopped."""
    # A large epsilon, as keys' biases have gradients of rounding alone, which Adam would scale up to the learning rate.
    quiet = {"model.gpt2.dropout": 0.0, "model.gpt2.word_dropout": 0.0, "optimizer.epsilon": 1e-2}
    quiet |= {"optimizer.average_decay": 0.9}
    config = {layout: settings(data_dir, {**quiet, "parallel.layout": layout}) for layout in ("data", "fsdp")}
    train(tmp_path / "whole", config["data"])
    run = tmp_path / "stopped"
    train_until(run, config["data"], 3)
    train_sharded_until(run, config["fsdp"], 5)
    assert {path.name for path in (run / "checkpoints" / "5" / "optimizer").rglob("*sharding*")}
    in_process(train_sharded_until, run, config["fsdp"], 7, devices=2)
    train(run, config["data"])
    assert_close(saved(run, STEPS), saved(tmp_path / "whole", STEPS))
    for found, expected in zip(logged(run), logged(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def train_sharded_until(run: Path, config: Config, step: int) -> None:
    """Train, everything divided that can be, and get a signal in that step."""
    sharded = functools.partial(parallel.FullySharded, whole_below=0)
    with mock.patch.dict(parallel.LAYOUTS, fsdp=sharded):
        assert f"Stopped after step {step}" in train_until(run, config, step)
