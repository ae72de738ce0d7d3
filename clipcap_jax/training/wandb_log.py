"""Training's numbers at Weights & Biases too, where that is asked for: nothing depends on whether they get there."""

import contextlib
import dataclasses
import importlib
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from clipcap_jax import files
from clipcap_jax.config import Config
from clipcap_jax.errors import UserError
from clipcap_jax.training.logs import NoLog

_ID = "wandb_id"  # a run's file with what W&B calls it
_PATIENCE = 30.0  # seconds for the service to answer, and to take the last numbers


def check(project: str) -> None:
    """See that numbers can be sent to a project, before anything else is begun.

    Raises:
      UserError: there is no package wandb, or it has no key, or a project cannot be called that.
    """
    try:
        wandb: Any = importlib.import_module("wandb")
        settings = wandb.Settings
    except (ImportError, AttributeError):  # the latter: a folder of this name is no package
        raise UserError('--wandb needs the package wandb: pip install "clipcap_jax[wandb]"') from None
    try:
        settings(project=project)
        wandb.login()
    except wandb.errors.UsageError as error:
        raise UserError(
            f"--wandb {project}: {error} With WANDB_MODE=offline no account is needed: `wandb sync` sends all later."
        ) from None
    except Exception:  # the service is away, which is told when the run begins
        pass


class WandbLog(NoLog):
    """Writes another log's numbers to a run at W&B as well, the same one whenever the training goes on.

    Where the service is away, training goes on. They are in `<run>/wandb` too, or of a run on a store in a temporary
    folder: how to send them later is told.
    """

    def __init__(self, log: NoLog, project: str, run: Path, config: Config, console: Console):
        self._log, self._console = log, console
        self._handled = sys.exception()  # what the caller may be handling
        self._run: Any = None
        self._wandb = wandb = importlib.import_module("wandb")
        options = {
            "project": project,
            "id": _identity(run),
            "resume": "allow",
            "name": run.name,
            "dir": tempfile.mkdtemp(prefix="clipcap_jax_wandb_") if files.is_remote(run) else str(run),
            "config": dataclasses.asdict(config),
            "settings": wandb.Settings(silent=True, console="off", init_timeout=_PATIENCE),
        }
        for mode in (None, "offline"):  # None: as WANDB_MODE says
            try:
                self._run = wandb.init(**options, mode=mode)
                break
            except Exception as error:
                self._give_up(error)
        if self._run and self._run.offline:
            console.print(f"W&B: offline; `wandb sync {_folder(self._run)}` sends the numbers", soft_wrap=True)
        elif self._run and self._run.url:  # which it has not where W&B is told to do nothing
            console.print(f"W&B: {self._run.url}", soft_wrap=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._log.write(step, values)
        if self._run:
            try:
                self._run.log(dict(values), step=step)
            except Exception as error:  # W&B's own process is gone, and does not come back
                self._give_up(error)

    def text(self, step: int, name: str, text: str) -> None:
        self._log.text(step, name, text)

    def keep(self) -> None:
        self._log.keep()

    def close(self) -> None:
        self._log.close()
        if run := self._run:
            failed = sys.exception() is not self._handled  # which closes this
            # In a thread, as a service that is away is waited for without an end.
            finish = threading.Thread(target=self._finish, args=(run, int(failed)), daemon=True)
            finish.start()
            finish.join(_PATIENCE)
            if finish.is_alive():
                self._warn(f"not all was sent within {_PATIENCE:.0f} s; `wandb sync {_folder(run)}` sends the rest")
            self._run = None

    def _finish(self, run: Any, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            if self._run:  # else it is waited for no more
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._warn(error)
        self._run = None
        with contextlib.suppress(Exception):
            self._wandb.teardown()  # or W&B's own process holds the run, and its end is waited for, and told, once more

    def _warn(self, reason: Any) -> None:
        first_line = str(reason).partition("\n")[0] or type(reason).__name__
        self._console.print(f"Warning: W&B: {first_line}", style="yellow", soft_wrap=True)


def _identity(run: Path) -> str:
    """What W&B calls the run, noted in its folder."""
    path, identity = run / _ID, uuid.uuid4().hex[:8]
    with contextlib.suppress(OSError), files.reached(path):
        if path.exists() and (known := path.read_text().strip()):
            return known
        path.write_text(identity + "\n")
    return identity


def _folder(run: Any) -> Path:
    """Where W&B keeps the numbers of this start of the training."""
    return Path(run.dir).parent
