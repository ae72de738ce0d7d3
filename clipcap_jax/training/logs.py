"""Training's numbers: on the screen, as lines of JSON, and in TensorBoard."""

import contextlib
import itertools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from clipcap_jax import files, progress
from clipcap_jax.errors import UserError
from clipcap_jax.training.alone import Hold
from clipcap_jax.training.background import regularly

COPIED = 30.0  # seconds between copies of the logs of a run on a store


class NoLog:
    """What other processes than the main one log to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As of a `MetricsLog`."""

    def text(self, step: int, name: str, text: str) -> None:
        """As of a `MetricsLog`."""

    def keep(self) -> None:
        """See that what was written outlives this process, if that is killed."""

    def close(self) -> None:
        """As of a `MetricsLog`."""


class MetricsLog(NoLog):
    """Writes `<run>/metrics.jsonl` and TensorBoard's event files in `<run>/tensorboard`."""

    def __init__(self, run: Path, first_step: int):
        """Open the logs of a run that starts, or goes on, after `first_step`; what was logged after it is dropped.

        Raises:
          UserError: they cannot be written; `write` raises it as well.
        """
        self._run = run
        path = run / "metrics.jsonl"

        def is_kept(line: bytes) -> bool:
            # A process that was killed leaves a line without its end, a power cut perhaps one of zeros.
            try:
                return line.endswith(b"\n") and json.loads(line)["step"] <= first_step
            except (ValueError, KeyError, TypeError):
                return False

        with self._explained():
            (run / "tensorboard").mkdir(parents=True, exist_ok=True)
            # Not its SummaryWriter, which writes from a thread: where that fails, whoever logs waits for ever.
            self._tensorboard = EventsWriter(str(run / "tensorboard" / "events"))
            # From here on, TensorBoard forgets what earlier files say of later steps.
            self._show(first_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._file = path.open("a", buffering=1, encoding="utf-8")
            lines = path.read_bytes().splitlines(keepends=True)
            self._file.truncate(sum(map(len, itertools.takewhile(is_kept, lines))))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step; a slash in a name groups it in TensorBoard."""
        with self._explained():
            self._file.write(files.to_json({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._show(step, summary=summary.scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text in TensorBoard."""
        with self._explained():
            self._show(step, summary=summary.text(name, text))

    def _show(self, step: int, **what: Any) -> None:
        self._tensorboard.write_event(Event(step=step, wall_time=time.time(), **what))
        self._tensorboard.flush()

    def close(self) -> None:
        for log in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):  # it was told when it was written
                log.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the logs of {self._run} cannot be written: {error.strerror}. Mend that, for instance make room; then "
                "the same command goes on from the last checkpoint."
            ) from error


class CopiedLog(MetricsLog):
    """A `MetricsLog` of a run on a store such as gs://, where nothing is appended to a file.

    It is written to a folder on this machine. From there whole files are copied: every `COPIED` seconds, before a
    checkpoint is saved, and in the end. If they cannot be, training goes on, as nothing depends on them: it is told
    once, and they are copied the next time. In the end they stay on this machine if the last copy failed.
    """

    def __init__(self, run: Path, first_step: int, hold: Hold, console: Console):
        """As of a `MetricsLog`; nothing is copied any more when the run is not this training's."""
        self._there, self._hold, self._console = run, hold, console
        self._here = Path(tempfile.mkdtemp(prefix="clipcap_jax_logs_"))
        try:
            with files.reached(run):
                (run / "tensorboard").mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    (self._here / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
        except OSError as error:
            raise UserError(f"the logs of {run} cannot be read: {error.strerror}") from error
        super().__init__(self._here, first_step)
        self._copied: dict[Path, tuple[int, int]] = {}  # the sizes and times of the files that were copied
        self._busy, self._failed = threading.Lock(), False
        self._copying = contextlib.ExitStack()
        self._copying.enter_context(regularly(self.keep, COPIED))

    def keep(self) -> None:
        with self._busy:
            self._hold.look()
            try:
                with files.reached(self._there):
                    self._copy()
            except OSError as error:
                if not self._failed:
                    told = f"Warning: the logs cannot be copied to {self._there} for now: {error.strerror}"
                    self._console.print(told, style="yellow", soft_wrap=True)
                self._failed = True

    def _copy(self) -> None:
        for path in [self._here / "metrics.jsonl", *(self._here / "tensorboard").iterdir()]:
            state = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._copied.get(path) != state and not self._hold.lost:
                (self._there / path.relative_to(self._here)).write_bytes(path.read_bytes())
                self._copied[path] = state
        self._failed = False

    def close(self) -> None:
        self._copying.close()
        super().close()
        self.keep()
        if self._failed:
            told = f"Warning: the last lines of the logs are in {self._here} alone: copy them to {self._there}."
            self._console.print(told, style="yellow", soft_wrap=True)
        else:
            shutil.rmtree(self._here)


def open_log(run: Path, first_step: int, hold: Hold, console: Console) -> MetricsLog:
    """The log of a run, wherever it lies; as of a `MetricsLog` and a `CopiedLog`."""
    return CopiedLog(run, first_step, hold, console) if files.is_remote(run) else MetricsLog(run, first_step)


class Monitor:
    """Shows and logs the steps, a step late so that the devices never wait, and stops at what is not finite."""

    def __init__(
        self,
        log: NoLog,
        console: Console,
        *,
        batch_size: int,
        log_every: int,
        start: int,
        total: int,
        losses: Sequence[float],
    ):
        """Start to show the steps after `start`.

        Args:
          log: where lines go, every `log_every` steps.
          console: where progress is shown.
          batch_size: pairs per step.
          log_every: steps between lines.
          start, total: the steps that are done, and those of the whole run.
          losses: the losses of the steps since the last line.
        """
        self._log, self._console = log, console
        self._every, self._batch_size = log_every, batch_size
        self.losses = list(losses)  # of the steps since the last line, for checkpoints
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since, self._last = time.perf_counter(), start
        self._progress = progress.bar(console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=start, start=False)
        self.stop = False  # whether a process was asked to stop, as all have agreed by now
        self._progress.start()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the numbers of a step that may still be computing."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Wait for the last step's numbers."""
        if self._pending is None:
            return
        step, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(metrics[name]):
                raise UserError(
                    f"the {name.replace('_', ' ')} of step {step} is {metrics[name]}. Training stopped; the last "
                    "checkpoint is from before that step. A lower config.optimizer.learning_rate, a longer "
                    "warmup_steps or clip_norm=1.0 usually helps; so does float32 instead of bfloat16."
                )
        self.losses.append(float(metrics["loss"]))
        self.stop = bool(metrics.get("stop", 0))
        if step % self._every == 0:
            now = time.perf_counter()
            rate = (step - self._last) * self._batch_size / (now - self._since)
            loss = float(np.mean(self.losses))  # a batch of short captions has another loss than one of long ones
            self._since, self._last = now, step
            self.losses.clear()
            self._log.write(
                step,
                {
                    "train/loss": loss,
                    "train/gradient_norm": float(metrics["gradient_norm"]),
                    "train/learning_rate": float(metrics["learning_rate"]),
                    "train/pairs_per_second": rate,
                },
            )
            self._progress.update(self._task, description=f"loss {loss:.3f}  {rate:.0f} pairs/s")
            if not self._console.is_terminal:
                self._console.print(f"step {step}  loss {loss:.3f}  {rate:.0f} pairs/s")
        self._progress.update(self._task, completed=step)
        # Not before the first step, once: what compiles for that says nothing of the time of others.
        self._progress.start_task(self._task)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Finish the last step, and leave the time spent in here out of the rate."""
        self.flush()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @contextlib.contextmanager
    def beside(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar below that of the steps for what is done meanwhile, in so many parts; gives what counts them."""
        task = self._progress.add_task(description, total=total)
        try:
            yield lambda parts: self._progress.advance(task, parts)
        finally:
            self._progress.remove_task(task)
            self._progress.refresh()  # or it would still stand below what is printed next

    def close(self) -> None:
        self._progress.stop()
