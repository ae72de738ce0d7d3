"""Config files: those of the project by name, any other by path; and the settings that a command line changes."""

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from clipcap_jax.errors import UserError

if TYPE_CHECKING:
    from clipcap_jax.config import Config

_SETTING = re.compile(r"--?(?:no)?config\.([^=]+)")


def folder() -> Path:
    """`configs/`: in the package where pip has copied it, beside it in a clone."""
    package = Path(__file__).parent
    return next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())


def names() -> list[str]:
    """Those that need no path, such as "shapes"."""
    return sorted(path.stem for path in folder().glob("*.py"))


def read(source: str) -> ConfigDict:
    """The values of a config file, for `config.from_dict(values.to_dict())`.

    Args:
      source: the name of one in `configs/`, or the path of a .py file with a function `get_config`; behind a colon,
        what that takes: "flickr8k:pixels".

    Raises:
      UserError: there is no such file, or it has no `get_config`.
    """
    name, _, variant = source.partition(":")
    path = folder() / f"{name}.py" if name in names() else Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"there is no config file {name}; by their names there are {', '.join(names())}")
    if path.suffix != ".py":
        raise UserError(f"{name} is no config file: those end in .py")
    spec: Any = importlib.util.spec_from_file_location("config", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    if not callable(get_config := getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config, which gives the settings")
    return ConfigDict(get_config(variant) if variant else get_config())


def as_read(config: "Config") -> ConfigDict:
    """The values that a config was built from, as `read` gives them."""
    return ConfigDict(_with_text(dataclasses.asdict(config)))


def _with_text(values: Any) -> Any:
    """ "none" for None, which no flag can say."""
    if isinstance(values, dict):
        return {name: _with_text(value) for name, value in values.items()}
    return "none" if values is None else values


def name_of(source: str) -> str:
    """What a run of it is called: "flickr8k" of "configs/flickr8k.py:pixels"."""
    return Path(source.partition(":")[0]).stem


def is_setting(argument: str) -> bool:
    """Whether an argument of a command line is for `change`."""
    return _SETTING.match(argument) is not None


def setting_names(values: ConfigDict) -> list[str]:
    """What `change` can change: "--config.train.epochs", ..."""
    return [f"--{name}" for name, value in _settings(values, "config") if not isinstance(value, ConfigDict)]


def change(values: ConfigDict, arguments: Sequence[str]) -> None:
    """Change settings as a command line says: "--config.train.epochs=3", or the value as an argument of its own.

    Raises:
      UserError: there is no such setting, its value has another type, or an argument is none of these.
    """
    for argument in arguments:
        if found := _SETTING.match(argument):
            _check_name(values, found[1])
    parsed, command = flags.FlagValues(), ["", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=command)
        _, *others = parsed(command)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if others:
        raise UserError(f"{' '.join(others)}: only options are taken, such as --workdir={others[0]}")


def _check_name(values: ConfigDict, name: str) -> None:
    settings = dict(_settings(values, "config"))
    if (name := f"config.{name}") in settings:
        return
    parent = name.rpartition(".")[0]
    while parent not in {"config", *settings}:
        parent = parent.rpartition(".")[0]
    if parent in settings and not isinstance(settings[parent], ConfigDict):
        raise UserError(f"{name} is not a setting here, as {parent} is {settings[parent]!r}: set that as a whole")
    close = difflib.get_close_matches(name, settings, n=1)
    siblings = [setting for setting in settings if setting.rpartition(".")[0] == parent]
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(siblings)}"
    raise UserError(f"{name} is not a setting: {hint}")


def _settings(values: ConfigDict, name: str) -> Iterator[tuple[str, Any]]:
    """All settings and groups of them, by their whole names."""
    for key, value in values.items():
        yield f"{name}.{key}", value
        if isinstance(value, ConfigDict):
            yield from _settings(value, f"{name}.{key}")
