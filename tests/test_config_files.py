import dataclasses
from pathlib import Path

import pytest

from clipcap_jax import config_files
from clipcap_jax.config import from_dict
from clipcap_jax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(size="small"):
    return ConfigDict({"train": {"epochs": 1.0, "steps": 3, "remat": False, "parts": ("a", "b"), "size": size}})
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def test_a_file_by_its_name_or_path(path: Path) -> None:
    assert config_files.read("flickr8k:pixels").data.input == "image"
    assert config_files.read(str(Path(__file__).parents[1] / "configs" / "flickr8k.py")).data.input == "embedding"
    assert config_files.read(str(path)).train.size == "small"
    assert config_files.read(f"{path}:large").train.size == "large"
    assert config_files.name_of(f"{path}:large") == "mine"
    assert set(config_files.names()) >= {"coco_mlp", "coco_transformer", "flickr8k", "shapes"}


def test_what_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no config file flickr; by their names there are coco_mlp, coco_transformer, fi"
    ):
        config_files.read("flickr")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(UserError, match=r"notes\.md is no config file: those end in \.py"):
        config_files.read(str(tmp_path / "notes.md"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py has no function get_config"):
        config_files.read(str(tmp_path / "empty.py"))


def test_a_config_as_it_was_read() -> None:
    for name in config_files.names():
        values = config_files.read(name)
        config = from_dict(values.to_dict())
        again = config_files.as_read(config)
        config_files.change(again, ["--config.train.trainable=('mapper',)"])
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, trainable=("mapper",)))
        assert from_dict(again.to_dict()) == changed


def test_changes(path: Path) -> None:
    values = config_files.read(str(path))
    arguments = ["--config.train.epochs=3", "--config.train.steps", "7", "--config.train.parts=('b',)"]
    config_files.change(values, [*arguments, "--config.train.remat", "--config.train.size=a=b"])
    assert values.train.to_dict() == {"epochs": 3.0, "steps": 7, "remat": True, "parts": ("b",), "size": "a=b"}
    config_files.change(values, ["--noconfig.train.remat"])
    assert values.train.remat is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.epoch=3", r"^config\.train\.epoch is not a setting: did you mean config\.train\.epochs\?$"),
        ("--config.traim.epochs=3", r"^config\.traim\.epochs is not a setting: did you mean config\.train\.epochs\?$"),
        ("--noconfig.train.remet", r"^config\.train\.remet is not a setting: did you mean config\.train\.remat\?$"),
        (
            "--config.train.0=3",
            r"^config\.train\.0 is not a setting: did you mean config\.train\?$",
        ),
        ("--config.train.size.width=3", r"as config\.train\.size is 'small': set that as a whole$"),
        ("--config.xyzzy.quux=3", r"^config\.xyzzy\.quux is not a setting: there are config\.train$"),
        ("--config.train.epochs=many", "could not convert string to float: 'many'"),
        ("--config.train.steps=1.5", r"--config\.train\.steps=1\.5"),
        ("--config.train=3", "is not a dict"),
        ("--config.train.epochs", "Missing value"),
        ("runs/x", "^runs/x: only options are taken, such as --workdir=runs/x$"),
    ],
)
def test_mistakes(path: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_files.change(config_files.read(str(path)), [argument])
