"""A run belongs to one training at a time: two would mix their checkpoints.

On a disk the system keeps a lock for as long as the process lives. A store such as gs:// has none. There, the file
`<run>/.lock` holds a random token of the training and a number that it counts up every `RENEWED` seconds. Who finds
such a file watches it: if the number rises, the run is taken; if it does not for `WATCHED` seconds, the training that
wrote it was killed, and the run is free. So no two machines' clocks are compared. Of two that write at once, the one
whose token is there `SETTLED` seconds later goes on. And a training that was cut off from the store, or asleep, finds
another's token when it is back, and stops before it saves anything.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from clipcap_jax import cluster, files
from clipcap_jax.errors import UserError
from clipcap_jax.training.background import regularly

LOCK = ".lock"
# Seconds.
RENEWED = 20.0
WATCHED = 90.0
SETTLED = 3.0


class Hold:
    """A run's folder that is this training's until it ends, as one on a disk; or that the main process holds."""

    @property
    def lost(self) -> bool:
        """As of a `Lease`."""
        return False

    def look(self) -> None:
        """As of a `Lease`."""

    def check(self) -> None:
        """As of a `Lease`."""


class Lease(Hold):
    """A run's folder on a store, that is this training's as long as nobody takes it over."""

    def __init__(self, run: Path):
        self._run, self._file = run, run / LOCK
        self._token, self._count = uuid.uuid4().hex, 0
        self._other = ""  # what another training wrote to the file

    @property
    def lost(self) -> bool:
        """Whether another training has taken it over."""
        return bool(self._other)

    def check(self) -> None:
        """Stop here if another training has taken it over.

        Raises:
          UserError: it has.
        """
        if self.lost:
            raise UserError(
                f"another training ({_holder(self._other)}) has taken {self._run} over, as this one was not heard of "
                f"for {WATCHED:.0f} seconds. This one has stopped, and left its checkpoints to the other."
            )

    def take(self, console: Console) -> None:
        """Wait until nobody else has it, and take it.

        Raises:
          UserError: another training has it.
          OSError: it cannot be read or written.
        """
        if found := self._read():
            self._watch(found, console)
        self._write()
        time.sleep(SETTLED)
        if not self._is_ours(found := self._read()):
            raise self._taken(found)

    def look(self) -> None:
        """Look whether it still is this training's; if the store cannot be reached, it is not known to be lost."""
        with contextlib.suppress(OSError):
            if not self._is_ours(found := self._read()):
                self._other = found

    def renew(self) -> None:
        """Count up; if the store cannot be reached, the next call does."""
        with contextlib.suppress(OSError):
            self.look()
            if not self.lost:
                self._write()

    def release(self) -> None:
        """Let others have it; if the store cannot be reached, they will find that it is not renewed."""
        with contextlib.suppress(OSError), files.reached(self._file):
            if self._count and self._is_ours(self._read()):
                self._file.unlink(missing_ok=True)

    def _watch(self, found: str, console: Console) -> None:
        console.print(
            f"{self._run} is or was another training's ({_holder(found)}). Looking for {WATCHED:.0f} seconds whether "
            "that still runs.",
            soft_wrap=True,
        )
        end = time.monotonic() + WATCHED
        while time.monotonic() < end:
            time.sleep(RENEWED / 4)
            now = self._read()
            if not now:
                return  # it has ended
            if now != found:
                raise self._taken(now)
        console.print("It does not: this one goes on in its place.")

    def _taken(self, found: str) -> UserError:
        return UserError(
            f"another process is training in {self._run} ({_holder(found)}): wait for it, or give another --workdir"
        )

    def _is_ours(self, found: str) -> bool:
        return not found or found.startswith(self._token)  # not found: somebody has deleted it

    def _read(self) -> str:
        try:
            with files.reached(self._file):
                return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        self._count += 1
        with files.reached(self._file):
            self._file.write_text(
                f"{self._token} {self._count} process {os.getpid()} on {socket.gethostname()}", encoding="utf-8"
            )


def _holder(found: str) -> str:
    return found.split(" ", 2)[-1]


@contextlib.contextmanager
def alone(run: Path, console: Console) -> Iterator[Hold]:
    """Keep a second training out of a run's folder, which is made.

    Args:
      run: the folder.
      console: where it is told that another's lock is watched.

    Raises:
      UserError: another process is training there, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        hold = Hold()
        try:
            with files.reached(run):
                run.mkdir(parents=True, exist_ok=True)
            if files.is_remote(run):
                hold = lease = Lease(run)
                stack.callback(lease.release)
                cluster.before_the_end(lease.release)
                lease.take(console)
                stack.enter_context(regularly(lease.renew, RENEWED))
            else:
                stack.enter_context(files.locked(run / LOCK, wait=False))
        except BlockingIOError:
            raise UserError(f"another process is training in {run}: wait for it, or give another --workdir") from None
        except OSError as error:
            raise UserError(f"{run} cannot be written: {error.strerror}") from error
        yield hold
