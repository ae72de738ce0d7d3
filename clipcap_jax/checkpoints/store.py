"""Orbax checkpoints that hold everything to go on training and everything to use the model elsewhere.

`<run>/checkpoints/<step>/` holds four Orbax items:

    params      the model's parameters, frozen parts included: nested dicts of float32 arrays
    optimizer   Optax's state, for the trained parts
    position    JSON: the step and the run's total, the random key's data, the losses since the last
                line of the log, the fingerprint of the data set
    metadata    JSON: format_version, config, tokenizer, encoder, embedding_width, decoding end token

`params` and `metadata` are all that captioning needs; plain Orbax restores them without this package.
"""

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from clipcap_jax import config as config_lib
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer

FORMAT_VERSION = 4
BEST_METRIC = "CIDEr"
FOLDER = "checkpoints"
_LOOKS = 10

T = TypeVar("T")


# Settings that a format brought, and what was the only way before.
_SINCE: dict[int, dict[str, Any]] = {
    2: {
        "model.mapper.dropout": 0.0,
        "train.pretrained": {"clip": "", "gpt2": ""},
        "train.targets": "all",
        "evaluate.decode.stop": "",
    },
    3: {"optimizer.average_decay": 0.0},
    4: {"model.gpt2.word_dropout": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about its model.

    Attributes:
      config: the run's.
      tokenizer: the one it was trained with.
      encoder: the name of what made the embeddings it reads, "" when it reads pictures or that is not known.
      embedding_width: E.
    """

    config: config_lib.Config
    tokenizer: Tokenizer
    encoder: str
    embedding_width: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.to_dict(),
            "encoder": self.encoder,
            "embedding_width": self.embedding_width,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Metadata":
        stored = _upgraded(stored)
        version = stored.get("format_version", "of another program")
        if version != FORMAT_VERSION:
            raise UserError(
                f"the checkpoint has format {version}, and this clipcap_jax reads format {FORMAT_VERSION}: "
                "install the version of clipcap_jax that wrote it"
            )
        return cls(
            config=config_lib.from_dict(stored["config"]),
            tokenizer=Tokenizer.from_dict(stored["tokenizer"]),
            encoder=stored["encoder"],
            embedding_width=stored["embedding_width"],
        )


def _upgraded(stored: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an older format, with what was the only way then for each setting that has come since."""
    stored = copy.deepcopy(stored)
    for version, settings in _SINCE.items():
        if stored.get("format_version") == version - 1:
            for name, value in settings.items():
                *path, last = name.split(".")
                part = stored["config"]
                for key in path:
                    part = part[key]
                part[last] = value
            stored["format_version"] = version
    return stored


def _best_metric(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def _despite_deletions(look: Callable[[], T]) -> T:
    """Look at a run's folder, again if a checkpoint went between its listing and the look at it.

    Training deletes old ones, and evaluation works beside it.
    """
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return look()
    return look()


def _item_handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
    }


def run_folder(name: str | Path) -> Path:
    """The folder that a run's name means.

    Raises:
      UserError: it is on another machine, such as gs://.
    """
    if "://" in str(name):
        raise UserError(f"{name}: runs and their checkpoints lie on a disk; copy them there, or mount the bucket")
    return Path(name).expanduser()


class Checkpoints:
    """The checkpoints of one run: saves the newest `keep` and the best by CIDEr, restores any."""

    def __init__(self, run: Path, *, keep: int | None = None):
        """Open a run's checkpoints.

        Args:
          run: the run's folder.
          keep: how many of the newest to keep when saving; None: only reading, beside a training run perhaps.
        """
        writing = keep is not None
        self.folder = run.absolute() / FOLDER
        if not writing and not self.folder.is_dir():
            raise UserError(f"{run} holds no checkpoints: give the folder of a run, the one that train.py wrote to")
        best = BestN(get_metric_fn=_best_metric, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=writing,
            read_only=not writing,
            cleanup_tmp_directories=writing,
            enable_async_checkpointing=False,
            best_fn=_best_metric,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]) if writing else None,
        )
        try:
            self._manager = _despite_deletions(
                lambda: ocp.CheckpointManager(self.folder, options=options, item_handlers=_item_handlers())
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be {'used' if writing else 'read'}: {error}") from error

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        position: dict[str, Any],
        metadata: Metadata,
        metrics: dict[str, float],
    ) -> None:
        """Write the checkpoint of `step`; a checkpoint is either whole or not there.

        Raises:
          UserError: the disk is full or cannot be written to.
        """
        items = {
            "params": ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(optimizer),
            "position": ocp.args.JsonSave(position),
            "metadata": ocp.args.JsonSave(metadata.to_dict()),
        }
        self._save(step, items, (params, optimizer), metrics)

    def save_weights(self, params: Any, metadata: Metadata) -> None:
        """Write weights that no training made, as step 0: captioning and `train.init_from` read them.

        Raises:
          UserError: as `save`.
        """
        items = {"params": ocp.args.StandardSave(params), "metadata": ocp.args.JsonSave(metadata.to_dict())}
        self._save(0, items, params, {})

    def _save(self, step: int, items: dict[str, Any], arrays: Any, metrics: dict[str, float]) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        disk = shutil.disk_usage(self.folder)
        if disk.free < size and disk.total:  # some file systems do not tell, and say 0
            raise self._not_saved(step, f"it takes {size:,} bytes, and {disk.free:,} are free")
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and "os_error_code" not in str(error):  # as tensorstore wraps them
                raise
            raise self._not_saved(step, str(error)) from error

    def _not_saved(self, step: int, reason: str) -> UserError:
        steps = self.steps()
        newest = f"The newest whole checkpoint is {steps[-1]}" if steps else "There is no whole checkpoint yet"
        return UserError(
            f"saving the checkpoint of step {step} to {self.folder} failed: {reason}. {newest}. "
            "Make room, then the same command goes on."
        )

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, ascending."""
        _despite_deletions(self._manager.reload)
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
          UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no finished checkpoint yet")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not which.isdigit() or int(which) not in steps:
            raise UserError(
                f"there is no checkpoint {which!r} in {self.folder}: there are {', '.join(map(str, steps))}"
            )
        return int(which)

    def metadata(self, step: int) -> Metadata:
        """What the checkpoint of `step` says about its model."""
        return Metadata.from_dict(self._restore(step, metadata=ocp.args.JsonRestore())["metadata"])

    def is_last(self, step: int) -> bool:
        """Whether training ended with `step`."""
        if step == 0:
            return True  # converted weights
        position = self._restore(step, position=ocp.args.JsonRestore())["position"]
        return bool(position["step"] == position["total"])

    def params(self, step: int) -> Any:
        """The parameters of `step`, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._restore(step, params=ocp.args.StandardRestore())["params"])

    def training_state(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Parameters, optimiser state and position of `step`, in the structure of the examples given."""
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            position=ocp.args.JsonRestore(),
        )
        return restored["params"], restored["optimizer"], restored["position"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint {self.folder}/{step} is gone or not whole: {error}\n"
                "Copy it again, or delete its folder and use the one before."
            ) from error

    def close(self) -> None:
        self._manager.close()


@contextlib.contextmanager
def opened(run: str | Path) -> Iterator[Checkpoints]:
    """A run's checkpoints, for reading."""
    checkpoints = Checkpoints(run_folder(run))
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def differences(expected: Any, found: Any) -> list[str]:
    """How two trees of arrays differ in names and shapes, a line each; empty: they do not."""
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (expected, found))
    ]
    return [
        f"{name}: {shapes[1].get(name, 'not there')}, where the config makes {shapes[0].get(name, 'none')}"
        for name in sorted({*shapes[0], *shapes[1]})
        if shapes[0].get(name) != shapes[1].get(name)
    ]
