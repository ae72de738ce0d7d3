"""A run's settings as a file in its folder, `config.json`, for people and to go on with."""

import dataclasses
import json
from pathlib import Path

from clipcap_jax import config as config_lib
from clipcap_jax import files
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import FORMAT_VERSION, upgraded
from clipcap_jax.config import Config
from clipcap_jax.errors import UserError

FILE = "config.json"


def write(run: Path, config: Config) -> None:
    """Write them to a run's folder.

    Raises:
      UserError: it cannot be written to.
    """
    text = files.to_json({"format_version": FORMAT_VERSION, "config": dataclasses.asdict(config)}, indent=2)
    try:
        with files.reached(run), files.whole(run / FILE) as path:
            path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{run / FILE} cannot be written: {error.strerror}") from error


def read(run: Path) -> Config | None:
    """Those in a run's folder; of a run that has no such file, those in its latest checkpoint; None: there is no run.

    Raises:
      UserError: they cannot be read.
    """
    path = run / FILE
    try:
        with files.reached(run):
            stored = json.loads(path.read_text())
        return config_lib.from_dict(upgraded(stored)["config"])
    except FileNotFoundError:
        if not store.has_checkpoints(run):
            return None
        with store.opened(run) as checkpoints:
            return checkpoints.metadata(checkpoints.find("latest")).config
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: {error}\nMend it, or delete it: then the settings in the latest checkpoint are taken."
        ) from error
