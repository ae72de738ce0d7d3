"""The smallest captioner and data sets: what tests train, in seconds.

As a config file it also serves the scripts: `train.py --config=tests/tiny.py` reads embeddings, `tests/tiny.py:pixels`
pictures. As a pytest plugin (see conftest.py) it gives the fixtures below.
"""

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import args
from PIL import Image

from clipcap_jax import __main__, config
from clipcap_jax.config import Config
from clipcap_jax.datasets import RecordsSource, prepare_records
from clipcap_jax.progress import screen
from clipcap_jax.training import loop
from clipcap_jax.training.logs import Monitor

T = TypeVar("T")
Clipcap = Callable[..., int]  # the fixture `clipcap`

ENCODER = "mean colour"
EMBEDDING_WIDTH = 5
IMAGE_SIZE = 16
SPLITS = {"train": 17, "val": 5, "test": 6}  # pictures; none a multiple of 4 devices
TRAIN_PAIRS = 33  # so that of 5 batches of 8 the last holds 1, and 3 of 4 devices have nothing
STEPS_PER_EPOCH = 5

_COLOURS = {
    "red": (200, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 200),
    "yellow": (200, 200, 20),
    "pink": (230, 120, 180),
    "grey": (128, 128, 128),
    "white": (250, 250, 250),
}
_SHADES = {"plain": 1.0, "dim": 0.8, "dark": 0.6, "nearly black": 0.3}


def get_config(variant: str = "embeddings") -> ConfigDict:
    """A run of 3 epochs, 15 steps, that validates after 6 and 12 and at the end, and saves every 4 steps as well."""
    pixels = variant == "pixels"
    return ConfigDict(
        {
            "data": {
                "name": "records/both",
                "data_dir": "",
                "input": "image" if pixels else "embedding",
                "max_tokens": 8,
                "pool_batches": 2,
                "workers": 2,
            },
            "tokenizer": {"source": "captions"},
            "model": {
                "clip": {
                    "image_size": IMAGE_SIZE,
                    "patch_size": 8,
                    "width": 32,
                    "layers": 1,
                    "heads": 2,
                    "embedding_width": 8,
                }
                if pixels
                else None,
                "mapper": {
                    "kind": "mlp",
                    "prefix_length": 2,
                    "clip_length": 2,
                    "layers": 1,
                    "heads": 2,
                    "dropout": 0.0,
                },
                "gpt2": {
                    "vocab_size": 320,
                    "positions": 24,
                    "width": 32,
                    "layers": 2,
                    "heads": 2,
                    "dropout": 0.1,
                    "word_dropout": 0.1,
                },
                "normalize_embedding": False,
                "dtype": "float32",
                "matmul_precision": "highest",
            },
            "optimizer": {
                "learning_rate": 5e-3,
                "warmup_steps": 2,
                "weight_decay": 0.01,
                "beta1": 0.9,
                "beta2": 0.99,
                "epsilon": 1e-8,
                "clip_norm": 1.0,
                "average_decay": 0.0,
            },
            "train": {
                "seed": 0,
                "epochs": 3.0,
                "batch_size": 8,
                "trainable": ("clip", "mapper", "gpt2") if pixels else ("mapper", "gpt2"),
                "pretrained": {"clip": "", "gpt2": ""},
                "init_from": "",
                "targets": "all",
                "label_smoothing": 0.1,
                "accumulation": 1,
                "remat": False,
                "gradient_dtype": "float32",
                "log_every": 1,
            },
            "parallel": {"layout": "data"},
            "evaluate": {
                "every": 6,
                "images": 4,
                "words": "ptb",
                "batch_size": 4,
                "decode": {"beam_size": 1, "max_tokens": 16, "length_penalty": 1.0, "stop": ""},
            },
            "checkpoint": {"every": 4, "keep": 10},
        }
    )


def make_config(data_dir: Path, changes: Mapping[str, Any] | None = None, variant: str = "embeddings") -> Config:
    """The config as `train.py` builds it, with changes such as {"train.epochs": 1.0}."""
    values = get_config(variant)
    values.update_from_flattened_dict({"data.data_dir": str(data_dir), **(changes or {})})
    return config.from_dict(values.to_dict())


def draw(colour: str, shade: str) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(int(_SHADES[shade] * value) for value in _COLOURS[colour]))


def captions(colour: str, shade: str, count: int) -> list[str]:
    """One to three captions, of different lengths, all of at most 8 tokens."""
    texts = [f"{colour} {shade}", f"{colour} in a {shade} picture", f"{colour} and only {shade} {colour}."]
    return texts[:count]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the tiny data sets are prepared from: `captions.jsonl`, `pictures/`, `embeddings.npy`."""

    folder: Path

    @property
    def captions(self) -> Path:
        return self.folder / "captions.jsonl"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings.npy"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """28 pictures with their captions and embeddings."""
    source = Source(tmp_path_factory.mktemp("source"))
    source.pictures.mkdir()
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    kinds = list(itertools.product(_SHADES, _COLOURS))
    embeddings, lines = [], []
    for i, split in enumerate(splits):
        shade, colour = kinds[11 * i % len(kinds)]  # so that every split has all shades and most colours
        picture = draw(colour, shade)
        picture.save(source.pictures / f"{i:02}.png")
        red, green, blue = np.asarray(picture)[0, 0] / 255
        embeddings.append([red, green, blue, red * green * blue, 1.0])
        texts = captions(colour, shade, 1 + i % 3)
        lines.append({"image": f"{i:02}.png", "image_id": f"{100 + i}", "captions": texts, "split": split})
    np.save(source.embeddings, np.array(embeddings, np.float32))
    source.captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source


@pytest.fixture(scope="session")
def data_dir(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data sets of the tiny pictures: records/both, records/pictures and records/embeddings."""
    data_dir = tmp_path_factory.mktemp("data")
    captions, pictures, embeddings = map(str, (source.captions, source.pictures, source.embeddings))
    for prepared in (
        RecordsSource("both", captions, images=pictures, embeddings=embeddings, encoder=ENCODER, store_images=True),
        RecordsSource("pictures", captions, images=pictures),
        RecordsSource("embeddings", captions, embeddings=embeddings, encoder=ENCODER),
    ):
        prepare_records(prepared, str(data_dir))
    return data_dir


@pytest.fixture
def photos(source: Source, tmp_path: Path) -> Path:
    """A folder with 28 pictures, one of them below another folder, and a text."""
    photos = tmp_path / "photos"
    shutil.copytree(source.pictures, photos)
    (photos / "more [new]").mkdir()
    (photos / "00.png").rename(photos / "more [new]" / "00.PNG")
    (photos / "notes.txt").write_text("not a picture")
    return photos


@pytest.fixture
def clipcap(monkeypatch: pytest.MonkeyPatch) -> Clipcap:
    """Runs the command with the given arguments and returns its exit status."""

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr("sys.argv", ["clipcap", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr("os._exit", sys.exit)  # as an interrupt ends it
        try:
            __main__.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def train(run: Path, settings: Config) -> str:
    """Train, and return what was printed."""
    printed = screen(file=io.StringIO(), width=200)
    try:
        loop.train(settings, run, printed)
    finally:
        jax.clear_caches()  # the programs of this training, which no other uses (see conftest.py)
    assert isinstance(printed.file, io.StringIO)
    return printed.file.getvalue()


def train_until(run: Path, settings: Config, step: int, signum: signal.Signals = signal.SIGTERM) -> str:
    """Train, get a signal in the middle of the given step, and return what was printed."""
    push = Monitor.push

    def push_and_signal(self: Monitor, pushed: int, metrics: dict[str, jax.Array]) -> None:
        push(self, pushed, metrics)
        if pushed == step:
            signal.raise_signal(signum)

    with mock.patch.object(Monitor, "push", push_and_signal):
        return train(run, settings)


def in_process(function: Callable[..., T], *args: Any, devices: int = 4) -> T:
    """Call a function of a module in a process of its own, with another number of devices perhaps."""
    environment = mock.patch.dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices))
    with environment, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def assert_ended(before: Set[threading.Thread]) -> None:
    """No thread is left but those; one that was told to end, as those of bars are, may take a moment."""
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def saved(run: Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds, by name, with what is frozen: arrays, and numbers of `position`; read by Orbax
    alone, as NumPy arrays: otherwise it wants the devices that they were saved from."""
    folder = run / "checkpoints" / str(step)
    names = [name for name in ("params", "optimizer", "unaveraged") if (folder / name).exists()]
    handlers = {name: ocp.StandardCheckpointHandler() for name in names}
    with ocp.CheckpointManager(
        run / "checkpoints", item_handlers={**handlers, "position": ocp.JsonCheckpointHandler()}
    ) as manager:
        found = manager.item_metadata(step)
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), {name: found[name] for name in names})
        items = {name: args.StandardRestore(example) for name, example in arrays.items()}
        stored = dict(manager.restore(step, args=args.Composite(**items, position=args.JsonRestore())).items())
    if (run / "frozen").exists():
        with ocp.StandardCheckpointer() as checkpointer:
            stored["params"] = {**checkpointer.restore(run / "frozen"), **stored["params"]}
    return named(stored)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts, lists and tuples, by names such as "params.mapper.Dense_0.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names, and bit by bit the same arrays."""
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name, strict=True)


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """To 1e-5 of the largest value."""
    assert actual.keys() == expected.keys()
    for name in expected:
        if np.asarray(expected[name]).dtype.kind == "U":
            assert actual[name] == expected[name], name
            continue
        largest = np.max(np.abs(expected[name]), initial=0.0)
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-5 * largest, err_msg=name)


# Enough to learn the colours of the training pictures.
_WHOLE_RUN = {"train.epochs": 40.0, "evaluate.every": 100, "checkpoint.every": 100}


@pytest.fixture(scope="session")
def embeddings_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was trained on embeddings, and captions pictures differently."""
    run = tmp_path_factory.mktemp("embeddings_run")
    train(run, make_config(data_dir, _WHOLE_RUN))
    return run


@pytest.fixture(scope="session")
def pixels_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was trained on pictures, and captions them differently."""
    run = tmp_path_factory.mktemp("pixels_run")
    train(run, make_config(data_dir, _WHOLE_RUN, "pixels"))
    return run
