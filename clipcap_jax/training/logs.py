"""Training's numbers: on the screen, as lines of JSON, and in TensorBoard."""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from clipcap_jax import progress
from clipcap_jax.errors import UserError


class NoLog:
    """What other processes than the main one log to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As of a `MetricsLog`."""

    def text(self, step: int, name: str, text: str) -> None:
        """As of a `MetricsLog`."""

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
            self._file = path.open("a", buffering=1)
            lines = path.read_bytes().splitlines(keepends=True)
            self._file.truncate(sum(map(len, itertools.takewhile(is_kept, lines))))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step; a slash in a name groups it in TensorBoard."""
        with self._explained():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
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
        self._task = self._progress.add_task("training", total=total, completed=start)
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
                self._console.print(f"step {step}  loss {loss:.3f}  {rate:.0f} pairs/s", highlight=False)
        self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Finish the last step, and leave the time spent in here out of the rate."""
        self.flush()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def close(self) -> None:
        self._progress.stop()
