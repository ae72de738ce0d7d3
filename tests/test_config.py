import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from clipcap_jax import config_files
from clipcap_jax.config import PRESETS, Config, from_dict
from clipcap_jax.errors import UserError
from clipcap_jax.models import clip_resnet, clip_vit, gpt2
from clipcap_jax.models.clip_resnet import ClipResnetConfig
from clipcap_jax.models.clip_vit import ClipVitConfig

ROOT = Path(__file__).parents[1]
CONFIGS = [*(f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))), "configs/flickr8k.py:pixels"]
# A config for each input: the second has a vision tower, the first none.
RESNET = {"image_size": 64, "width": 8, "blocks": (1, 1, 1, 1), "heads": 4, "embedding_width": 16}
EMBEDDINGS, PIXELS = "configs/flickr8k.py", "configs/flickr8k.py:pixels"


def load(*arguments: str) -> ConfigDict:
    """The config as `clipcap train` makes it of its arguments."""
    whole = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    whole = ["finetune" if name.startswith("finetune:") else name for name in whole]  # whose runs are not there
    values = config_files.read(str(ROOT / whole[0]) if whole[0].startswith("configs/") else whole[0])
    config_files.change(values, [argument for argument in arguments if not argument.startswith("--config=")])
    return values


def changed(name: str, changes: dict[str, Any]) -> Config:
    values = load(f"--config={name}")
    values.unlock()
    with values.ignore_type():
        values.update_from_flattened_dict(changes)
    return from_dict(values.to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_complete_and_consistent(name: str) -> None:
    values = load(f"--config={name}").to_dict()
    config = from_dict(values)
    if isinstance(clip := values["model"]["clip"], str):
        values["model"]["clip"] = None if clip == "none" else dataclasses.asdict(PRESETS[clip])
    assert dataclasses.asdict(config) == values
    assert from_dict(dataclasses.asdict(config)) == config
    assert isinstance(config.train.trainable, tuple)


@pytest.mark.parametrize(
    ("name", "trainable", "input_"),
    [
        ("configs/coco_mlp.py", ("mapper", "gpt2"), "embedding"),
        ("configs/coco_transformer.py", ("mapper",), "embedding"),
        ("configs/finetune.py", ("mapper", "gpt2"), "image"),
        ("configs/flickr8k.py", ("mapper", "gpt2"), "embedding"),
        ("configs/flickr8k.py:pixels", ("clip", "mapper", "gpt2"), "image"),
    ],
)
def test_what_the_docs_say_of_the_configs(name: str, trainable: tuple[str, ...], input_: str) -> None:
    config = from_dict(load(f"--config={name}").to_dict())
    assert (config.train.trainable, config.data.input) == (trainable, input_)


def documented() -> Iterator[Any]:
    """Every piece of code in the documentation that sets the config, as its arguments."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text().replace("\\\n", " ")
        lines = [
            line for block in re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL) for line in block.split("\n")
        ]
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        for code in lines + spans:
            if "--config" not in code:  # it may be anything, and need not be quoted as shells want it
                continue
            if arguments := [word for word in shlex.split(code) if re.match(r"--config[=.]", word)]:
                yield pytest.param(arguments, id=f"{path.name}: {' '.join(arguments)}")


DOCUMENTED = list(documented())


def test_the_documentation_has_commands() -> None:
    """That they are found: a whole command, one with an override, and an override on its own."""
    found = [tuple(param.values[0]) for param in DOCUMENTED]
    assert ("--config=configs/shapes.py",) in found
    assert ("--config=configs/flickr8k.py:pixels", "--config.data.name=records/mine") in found
    assert ("--config.train.epochs=3",) in found


@pytest.mark.parametrize("arguments", DOCUMENTED)
def test_documented_commands_are_accepted(arguments: list[str]) -> None:
    whole = any(argument.startswith("--config=") for argument in arguments)
    for name in [None] if whole else CONFIGS:  # an override on its own has to suit every config
        values = load(*([f"--config={name}"] if name else []), *arguments)
        config = from_dict(values.to_dict())
        for path, value in re.findall(r"--config\.(\S+?)=(\S*)", " ".join(arguments)):
            found = functools.reduce(getattr, path.split("."), config)
            shown = str(found).replace(" ", "")
            assert shown in (value, f"{value}.0", value.capitalize()) or found == PRESETS[value]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (EMBEDDINGS, {"train.epoch": 3.0}, "config.train.epoch is not a setting: did you mean 'epochs'?"),
        (EMBEDDINGS, {"optimiser": {}}, "config.optimiser is not a setting: did you mean 'optimizer'?"),
        (EMBEDDINGS, {"checkpoint.colour": 1}, "config.checkpoint.colour is not a setting: there are every, keep"),
        (EMBEDDINGS, {"train.batch_size": 4.0}, "config.train.batch_size is 4.0, a float; it has to be a int"),
        (EMBEDDINGS, {"train.seed": True}, "config.train.seed is True, a bool; it has to be a int"),
        (EMBEDDINGS, {"optimizer.learning_rate": "fast"}, "config.optimizer.learning_rate is 'fast', a str"),
        (EMBEDDINGS, {"model.normalize_embedding": 1}, "config.model.normalize_embedding is 1, a int"),
        (EMBEDDINGS, {"data.name": None}, "config.data.name is None, a NoneType; it has to be a str"),
        (EMBEDDINGS, {"data.input": "pixels"}, "config.data.input is 'pixels'; it can be 'image', 'embedding'"),
        (EMBEDDINGS, {"model.mapper.kind": "cnn"}, "config.model.mapper.kind is 'cnn'; it can be 'mlp', 'transformer'"),
        (EMBEDDINGS, {"train.trainable": ("mapper", "gpt")}, "config.train.trainable[1] is 'gpt'; it can be 'clip'"),
        (EMBEDDINGS, {"train.trainable": "mapper"}, "config.train.trainable is 'mapper', a str; it has to be a tuple"),
        (EMBEDDINGS, {"model.gpt2": "large"}, "config.model.gpt2 is 'large'; it has to hold the fields of Gpt2Config"),
        (
            EMBEDDINGS,
            {"model.clip": "ViT-B/33"},
            "config.model.clip is 'ViT-B/33'; it has to hold the fields of ClipVitConfig or ClipResnetConfig, or be "
            "one of ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, RN50, RN101, RN50x4, RN50x16, RN50x64",
        ),
        (EMBEDDINGS, {"model.clip": "gpt2"}, "config.model.clip is 'gpt2'; it has to hold the fields of"),
        (EMBEDDINGS, {"model.gpt2": "RN50"}, "config.model.gpt2 is 'RN50'; it has to hold the fields of Gpt2Config"),
        (PIXELS, {"train.pretrained.gpt2": "gpt2"}, "pretrained.gpt2 needs the tokenizer that it was trained with"),
        (PIXELS, {"model.clip": {"blocks": (3, 4, 6, 3)}}, "config.model.clip lacks image_size, width, heads, embed"),
        (PIXELS, {"model.clip": RESNET | {"image_size": 100}}, "clip.image_size is 100: it has to be a multiple of 32"),
        (PIXELS, {"model.clip": RESNET | {"heads": 7}}, "config.model.clip.heads is 7: it has to divide the width, 25"),
        (EMBEDDINGS, {"data.input": "image"}, 'config.data.input is "image", but config.model.clip is None'),
        (EMBEDDINGS, {"model.clip": "RN50x4"}, "config.model.clip is set, but the model learns from stored embeddings"),
        (EMBEDDINGS, {"train.trainable": ("clip",)}, 'trainable names "clip", but the model reads stored embeddings'),
        (EMBEDDINGS, {"train.trainable": ()}, "config.train.trainable is empty: name at least one of clip, mapper"),
        (EMBEDDINGS, {"model.gpt2.positions": 45}, "positions is 45, but prefix and caption take up to 46"),
        (EMBEDDINGS, {"evaluate.decode.max_tokens": 59}, "positions is 64, but prefix and caption take up to 65"),
        (PIXELS, {"evaluate.decode.beam_size": 3001}, "decode.beam_size is larger than config.model.gpt2.vocab_size"),
        (EMBEDDINGS, {"model.gpt2.heads": 7}, "config.model.gpt2.heads is 7: it has to divide the width, 256"),
        (EMBEDDINGS, {"model.mapper.heads": 7}, "config.model.mapper.heads is 7: it has to divide the width, 256"),
        (PIXELS, {"model.clip.heads": 7}, "config.model.clip.heads is 7: it has to divide the width, 256"),
        (PIXELS, {"model.clip.patch_size": 15}, "image_size is 128: it has to be a multiple of patch_size, 15"),
        (EMBEDDINGS, {"evaluate.every": 0}, "config.evaluate.every is 0: it has to be greater"),
        (EMBEDDINGS, {"train.epochs": 0}, "config.train.epochs is 0: it has to be greater"),
        (
            EMBEDDINGS,
            {"data.max_tokens": -1},
            "config.data.max_tokens is -1: it has to be a number that is not negative",
        ),
        (EMBEDDINGS, {"train.seed": -1}, "config.train.seed is -1: it has to be a number that is not negative"),
        (EMBEDDINGS, {"optimizer.epsilon": math.nan}, "config.optimizer.epsilon is nan: it has to be a number"),
        (EMBEDDINGS, {"train.epochs": math.inf}, "config.train.epochs is inf: it has to be a number"),
        (EMBEDDINGS, {"optimizer.beta2": 1.0}, "config.optimizer.beta2 is 1.0: it has to be below 1"),
        (EMBEDDINGS, {"train.label_smoothing": 1}, "config.train.label_smoothing is 1.0: it has to be below 1"),
    ],
)
def test_mistakes(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        changed(name, changes)


def test_fields_from_a_command_line() -> None:
    sizes = clip_vit.ClipVitConfig(32, 8, 16, 1, 2, 24)
    text = str(dataclasses.asdict(sizes))
    assert changed(EMBEDDINGS, {"model.clip": text, "train.pretrained.clip": "x"}).model.clip == sizes
    with pytest.raises(UserError, match=r"config.model.clip is '\{\}\}'; it has to hold the fields"):
        changed(EMBEDDINGS, {"model.clip": "{}}"})


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_every_setting_has_to_be_there(section: str) -> None:
    values = load(f"--config={PIXELS}").to_dict()
    for field in values[section]:
        without = values | {section: {name: value for name, value in values[section].items() if name != field}}
        with pytest.raises(UserError, match=rf"^config\.{section} lacks {field}$"):
            from_dict(without)
    with pytest.raises(UserError, match=f"^config lacks {section}$"):
        from_dict({name: value for name, value in values.items() if name != section})


@pytest.mark.parametrize("values", [None, [], "configs/shapes.py"])
def test_what_is_no_config(values: Any) -> None:
    with pytest.raises(UserError, match=r"it has to hold the fields of Config"):
        from_dict(values)


def test_whole_numbers_serve_as_fractions() -> None:
    config = changed(EMBEDDINGS, {"train.epochs": 3, "optimizer.clip_norm": 0})
    assert (config.train.epochs, config.optimizer.clip_norm) == (3.0, 0.0)
    assert type(config.train.epochs) is type(config.optimizer.clip_norm) is float


def test_zeros_that_mean_something() -> None:
    zeros = [
        "data.workers",
        "optimizer.warmup_steps",
        "optimizer.weight_decay",
        "evaluate.images",
        "model.gpt2.dropout",
        "model.gpt2.word_dropout",
    ]
    changed(EMBEDDINGS, dict.fromkeys([*zeros, "evaluate.decode.length_penalty", "train.label_smoothing"], 0))


def test_presets_by_name() -> None:
    weights = {"train.pretrained.clip": "a file"}
    config = changed(EMBEDDINGS, weights | {"model.clip": "RN50x4", "model.gpt2": "gpt2-medium"})
    assert config.model.clip == clip_resnet.PRESETS["RN50x4"]
    assert config.model.gpt2 == gpt2.PRESETS["gpt2-medium"]
    assert changed(EMBEDDINGS, weights | {"model.clip": "ViT-L/14"}).model.clip == clip_vit.PRESETS["ViT-L/14"]
    assert changed(EMBEDDINGS, {"model.clip": "none"}).model.clip is None  # as flags have to write it


def test_a_tower_is_the_one_whose_fields_are_given() -> None:
    assert changed(PIXELS, {"model.clip": RESNET}).model.clip == ClipResnetConfig(64, 8, (1, 1, 1, 1), 4, 16)
    assert isinstance(changed(PIXELS, {}).model.clip, ClipVitConfig)


def test_a_misspelt_variant() -> None:
    with pytest.raises(Exception, match="has no variant 'pixel': it can be embeddings or pixels"):
        load("--config=configs/flickr8k.py:pixel")


def test_sharded_gradients_are_summed_as_they_are_computed() -> None:
    with pytest.raises(UserError, match=r'config.train.gradient_dtype is "bfloat16", but'):
        changed(EMBEDDINGS, {"parallel.layout": "fsdp", "train.gradient_dtype": "bfloat16"})
