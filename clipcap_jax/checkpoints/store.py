"""Orbax checkpoints that hold everything to go on training and everything to use the model elsewhere.

`<run>/checkpoints/<step>/` holds these Orbax items:

    params      of the trained parts, or their averages where the run keeps these: nested dicts of float32 arrays
    unaveraged  of the trained parts as they are, where `params` are averages
    optimizer   Optax's state, for the trained parts
    position    JSON: the step and the run's total, the losses since the last line of the log, the fingerprint of the
                data set
    metadata    JSON: format_version, config, tokenizer, encoder, embedding_width, decoding end token

`<run>/frozen/` is an Orbax checkpoint of the parts that are not trained: it is written once. With it, `params` and
`metadata` are all that captioning needs; plain Orbax restores them without this package. Up to format 4, `params` held
the frozen parts too, and `optimizer` what is now `unaveraged`.

A run lies on a disk, or on gs://: there Orbax writes the arrays by tensorstore's own driver, and the rest through
etils.epath; and a checkpoint is whole when Orbax has put the file `commit_success.txt` into it.
"""

import contextlib
import dataclasses
import glob
import logging
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec.config
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from clipcap_jax import cluster, files
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.checkpoints.orbax_errors import orbax_errors
from clipcap_jax.errors import UserError
from clipcap_jax.progress import told

BEST_METRIC = "CIDEr"
FOLDER = "checkpoints"
FROZEN = "frozen"
_LOOKS = 10

T = TypeVar("T")

# Or what another process writes to a run on gs:// would not be seen: gcsfs keeps what it was once told of a folder.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what goes wrong it also raises


class _AverageOf4(NamedTuple):
    """What the optimiser's state of format 4 ends in, where averages are kept: `average` are the parameters."""

    steps: Any
    average: Any


class Damaged(UserError):
    """A checkpoint is gone or not whole."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds to go on with, its arrays as NumPy arrays.

    Attributes:
      step: of the checkpoint.
      metadata: what it says about its model.
      params: of all parts, frozen ones included, as the last step made them.
      average: of the trained parts; None where none is kept.
      optimizer: Optax's state.
      position: see the top of this file.
    """

    step: int
    metadata: Metadata
    params: dict[str, Any]
    average: dict[str, Any] | None
    optimizer: Any
    position: dict[str, Any]


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


def run_folder(name: str | Path) -> Path:
    """The folder that a run's name means: a `pathlib.Path`, or of gs:// an `epath.Path`, which has the same methods.

    Raises:
      UserError: it is at a place that Orbax does not write to, such as s3://, or its name is no UTF-8.
    """
    if files.is_remote(name) and not str(name).startswith("gs://"):
        raise UserError(f"{name}: runs and their checkpoints lie on a disk or on gs://, which Orbax can write to")
    files.check_utf8(name)
    return files.place(name)


def has_checkpoints(run: Path) -> bool:
    """Whether a training has begun in a run's folder.

    Raises:
      UserError: it cannot be reached.
    """
    try:
        with files.reached(run):
            return (run / FOLDER).is_dir()
    except OSError as error:
        raise UserError(f"{run} cannot be read: {error.strerror}") from error


class Checkpoints:
    """The checkpoints of one run: saves the newest `keep` and the best by CIDEr, restores any."""

    def __init__(self, run: Path, *, keep: int | None = None):
        """Open a run's checkpoints.

        Args:
          run: the run's folder.
          keep: how many of the newest to keep when saving; None: only reading, beside a training run perhaps.
        """
        writing = keep is not None
        self._run = run if files.is_remote(run) else run.absolute()
        self.folder = self._run / FOLDER
        # With such a name Orbax finds nothing to put together, and saves what nothing can read.
        if writing and glob.escape(str(self._run)) != str(self._run):
            raise UserError(
                f"{self._run}: Orbax cannot save checkpoints where a folder's name has [, * or ? in it, which it "
                "takes for a pattern. Give another folder."
            )
        if not writing and not has_checkpoints(run):
            raise UserError(f"{run} holds no checkpoints: give the folder of a run, one that `clipcap train` wrote to")
        best = BestN(get_metric_fn=_best_metric, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=writing,
            read_only=not writing,
            cleanup_tmp_directories=writing,
            enable_async_checkpointing=writing,
            best_fn=_best_metric,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]) if writing else None,
        )
        self._writing = 0  # the step that is being saved
        try:
            with files.reached(run):
                self._manager = _despite_deletions(
                    lambda: ocp.CheckpointManager(self.folder, options=options, item_handlers=self._item_handlers())
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be {'used' if writing else 'read'}: {error}") from error
        if writing:
            orbax_errors.listeners.add(self._failed)

    def _item_handlers(self) -> dict[str, Any]:
        return {
            "params": ocp.StandardCheckpointHandler(),
            "unaveraged": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        }

    def _failed(self, error: BaseException) -> None:
        if cluster.joined() and self._writing:
            cluster.fail(self._not_saved(self._writing, str(error)) if _is_of_the_system(error) else error)

    def save(
        self,
        step: int,
        *,
        params: Any,
        unaveraged: Any,
        optimizer: Any,
        position: dict[str, Any],
        metadata: Metadata,
        metrics: dict[str, float],
    ) -> None:
        """Begin to write the checkpoint of `step`; a checkpoint is either whole or not there.

        It is written while training goes on. If that fails, the next call says so, or `wait`.

        Args:
          step: how many were taken.
          params, optimizer: trees of arrays, which may be changed or donated when this returns.
          unaveraged: another one, where `params` are averages; None where they are not.
          position, metadata: see above.
          metrics: of a validation, among them `BEST_METRIC`; or nothing. Those that are not finite are left out.

        Raises:
          UserError: the disk is full or cannot be written to, or the store cannot be.
        """
        items = {
            "params": ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(optimizer),
            "position": ocp.args.JsonSave(position),
            "metadata": ocp.args.JsonSave(metadata.to_dict()),
        }
        if unaveraged is not None:
            items["unaveraged"] = ocp.args.StandardSave(unaveraged)
        # JSON has no other numbers.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._save(step, items, (params, unaveraged, optimizer), finite)

    def save_frozen(self, params: Any) -> None:
        """Write the parts that no step changes, unless a run that goes on has written them.

        Raises:
          UserError: as `save`.
        """
        folder = self._run / FROZEN
        if not params:
            return
        try:
            with files.reached(folder):
                # On a disk Orbax gives it its name when it is whole; on gs:// a file says so, and there may be a part.
                if not ocp.utils.is_checkpoint_finalized(folder):
                    with ocp.StandardCheckpointer() as checkpointer:
                        checkpointer.save(folder, params, force=files.is_remote(folder))
        except (OSError, ValueError) as error:
            if not _is_of_the_system(error):
                raise
            raise UserError(f"{folder} cannot be written: {error}. {self._mend}, then start again.") from error

    def save_weights(self, params: Any, metadata: Metadata) -> None:
        """Write weights that no training made, as step 0: captioning and `train.init_from` read them.

        Raises:
          UserError: as `save`.
        """
        items = {"params": ocp.args.StandardSave(params), "metadata": ocp.args.JsonSave(metadata.to_dict())}
        self._save(0, items, params, {})
        self.wait()

    def _save(self, step: int, items: dict[str, Any], arrays: Any, metrics: dict[str, float]) -> None:
        if not files.is_remote(self.folder):
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
            disk = shutil.disk_usage(self.folder)
            if disk.free < size and disk.total:  # some file systems do not tell, and say 0
                raise self._not_saved(step, f"it takes {size:,} bytes, and {disk.free:,} are free")
            if cluster.is_main():  # which makes the folders; Orbax would wait ten minutes for what cannot be made
                trial = self.folder / "trial"
                try:
                    trial.mkdir(exist_ok=True)
                    trial.rmdir()
                except OSError as error:
                    raise self._not_saved(step, str(error)) from error
        with self._explained():
            self._manager.wait_until_finished()
        self._writing = step
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None, force=True)

    def wait(self) -> None:
        """Wait until what is being saved is there.

        Raises:
          UserError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        waiting = f"Saving the checkpoint of step {self._writing}"
        try:
            with files.reached(self.folder), told(waiting) if cluster.is_main() else contextlib.nullcontext():
                yield
        except (OSError, ValueError) as error:
            if not _is_of_the_system(error):
                raise
            raise self._not_saved(self._writing, str(error)) from error

    def _not_saved(self, step: int, reason: str) -> UserError:
        if not cluster.joined():  # whose processes would wait for each other
            with contextlib.suppress(OSError, ValueError), files.reached(self.folder):
                self._manager.wait_until_finished()
        try:
            with files.reached(self.folder):
                steps = [found for found in sorted(ocp.utils.checkpoint_steps(self.folder)) if found != step]
            newest = f"The newest whole checkpoint is {steps[-1]}" if steps else "There is no whole checkpoint yet"
        except OSError as error:
            newest = str(error)
        return UserError(
            f"saving the checkpoint of step {step} to {self.folder} failed: {reason}. {newest}. "
            f"{self._mend}, then the same command goes on."
        )

    @property
    def _mend(self) -> str:
        return "Mend that" if files.is_remote(self.folder) else "Mend that, for instance make room"

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, ascending.

        Raises:
          UserError: the folder cannot be read.
        """
        try:
            with files.reached(self.folder):
                _despite_deletions(self._manager.reload)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error}") from error
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
        return step == self.total(step)

    def total(self, step: int) -> int:
        """How many steps the run of `step` has in the end; 0 of converted weights."""
        if step == 0:
            return 0
        return int(self._restore(step, position=ocp.args.JsonRestore())["position"]["total"])

    def scores(self, step: int) -> dict[str, float]:
        """Of the validation at `step`; none if there was none."""
        with self._intact(step):
            return dict(self._manager.metrics(step) or {})

    def params(self, step: int) -> dict[str, Any]:
        """The parameters of `step`, frozen parts included, as NumPy arrays.

        Raises:
          Damaged: it is not whole.
          UserError: what was frozen is not there any more.
        """
        found = {**self._frozen(), **self._params(step)}
        config = self.metadata(step).config
        parts = {"mapper", "gpt2"} | ({"clip"} if config.model.clip else set())
        if missing := parts - {*config.train.trainable} - found.keys():
            raise UserError(
                f"{self._run / FROZEN} is missing, which holds {', '.join(sorted(missing))}: copy it as well"
            )
        return found

    def _params(self, step: int) -> dict[str, Any]:
        # As NumPy arrays: otherwise Orbax wants the devices that they were saved from.
        with self._intact(step):
            stored = self._manager.item_metadata(step)["params"]
            if stored is None:
                raise FileNotFoundError(f"{self.folder / str(step) / 'params'} is missing")
        example = jax.tree.map(_example, dict(stored))
        return dict(self._restore(step, params=ocp.args.StandardRestore(example))["params"])

    def _frozen(self) -> dict[str, Any]:
        folder = self._run / FROZEN
        try:
            with files.reached(folder), ocp.StandardCheckpointer() as checkpointer:
                if not folder.exists():
                    return {}  # everything is trained, or an older format has it in `params`
                return dict(jax.tree.map(np.asarray, checkpointer.restore(folder)))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{folder} is not whole: {error}\nCopy it again.") from error

    def restore(self, step: int, trained: Any, optimizer: Any, *, averages: bool) -> "Restored":
        """What training goes on with, as NumPy arrays.

        Args:
          step: of the checkpoint.
          trained, optimizer: arrays, or their shapes, like the trained parts' parameters and Optax's state.
          averages: whether the run keeps averages.

        Raises:
          Damaged: it is not whole.
        """
        optimizer, trained = jax.tree.map(_example, (optimizer, trained))
        items = {"optimizer": optimizer}
        if averages and "unaveraged" in self._items(step):
            items["unaveraged"] = trained
        elif averages:
            items["optimizer"] = (optimizer, _AverageOf4(_example(jax.ShapeDtypeStruct((), np.int32)), trained))
        arguments = {name: ocp.args.StandardRestore(example) for name, example in items.items()}
        found = self._restore(step, position=ocp.args.JsonRestore(), **arguments)
        params, average, optimizer = self.params(step), None, found["optimizer"]
        if averages:
            average = {name: params[name] for name in trained}
            params |= found["unaveraged"] if "unaveraged" in items else optimizer[1].average
            optimizer = optimizer if "unaveraged" in items else optimizer[0]
        return Restored(step, self.metadata(step), params, average, optimizer, found["position"])

    def set_aside(self, step: int) -> Path:
        """Move a damaged checkpoint out of the way of a new one of its step; returns where it is then.

        Of several processes, which all call this, the first one moves it.
        """
        place = self._run / f"damaged-{step}-{uuid.uuid4().hex[:8]}"
        try:
            with files.reached(place):
                cluster.meet()  # none reads it any more
                if cluster.is_main():
                    (self.folder / str(step)).rename(place)
                cluster.meet()
                self._manager.reload()
        except OSError as error:
            raise UserError(f"{self.folder / str(step)} is damaged and cannot be moved away: {error}") from error
        return place

    def _items(self, step: int) -> set[str]:
        folder = self.folder / str(step)
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def _restore(self, step: int, **items: Any) -> Any:
        with self._intact(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _intact(self, step: int) -> Iterator[None]:
        try:
            with files.reached(self.folder):
                yield
        except (OSError, KeyError, ValueError) as error:
            if files.is_remote(self.folder) and _is_of_the_system(error) and not _is_missing(error):
                raise UserError(f"the checkpoint {self.folder}/{step} cannot be read: {error}") from error
            raise Damaged(
                f"the checkpoint {self.folder}/{step} is gone or not whole: {error}\n"
                "Copy it again, or delete its folder and use the one before."
            ) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            orbax_errors.listeners.discard(self._failed)
            self._manager.close()


def _example(leaf: Any) -> np.ndarray:
    """What has the shape and type of an array, and takes no memory; Orbax restores a NumPy array for it."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _is_of_the_system(error: BaseException) -> bool:
    """Whether it is the disk's or the store's and not ours."""
    wrapped = r"os_error_code|http_response_code|^UNAVAILABLE|^DEADLINE_EXCEEDED"  # as tensorstore does
    return isinstance(error, OSError) or re.search(wrapped, str(error)) is not None


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or str(error).startswith("NOT_FOUND")


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
