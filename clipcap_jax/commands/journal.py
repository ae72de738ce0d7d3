"""What is done of a long job: a file of JSON lines, from which the same command goes on after any end."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from clipcap_jax.errors import UserError
from clipcap_jax.files import is_remote, locked, on_disk, reached, to_json

Row = dict[str, Any]
_KEY = "made from"
_LONGEST = 1 << 20  # bytes of the first line


@dataclasses.dataclass
class Journal:
    """A file whose first line says what the job is made from; each further line is a row that is done.

    Attributes:
      file: of the lines, open to read and to append.
      done: how many rows it has.
    """

    file: IO[bytes]
    done: int = 0

    def rows(self) -> Iterator[Row]:
        """All rows, in order."""
        self.file.seek(0)
        next(self.file)
        yield from map(json.loads, self.file)

    def add(self, row: Row) -> None:
        """Write a row, which is done then even if the process is killed."""
        self._write(row)
        self.done += 1

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Write the first line, and remove what there was."""
        self.file.seek(0)
        self._write({_KEY: made_from})
        self.file.truncate()

    def _write(self, row: Row) -> None:
        self.file.write(to_json(row).encode() + b"\n")
        self.file.flush()


@contextlib.contextmanager
def opened(path: Path, made_from: Mapping[str, Any], *, anew: bool) -> Iterator[Journal]:
    """The journal at `path`, to go on with or new; no other process can open it meanwhile.

    On a store such as gs://, to which nothing can be appended, it is written when this is left: a kill loses it.

    Args:
      path: where it lies; whoever has finished removes it.
      made_from: all that decides about the rows, as JSON values.
      anew: begin it anew where it is of something else, rather than refuse.

    Raises:
      UserError: it is of something else, another process has it, or it cannot be written.
    """
    made_from = json.loads(json.dumps(made_from))
    try:
        with on_disk(path) as here:
            with reached(path):
                if is_remote(path) and path.exists():
                    here.write_bytes(path.read_bytes())
            with locked(here, wait=False), here.open("r+b") as file:
                journal = Journal(file)
                if not _go_on(journal, path, made_from, anew=anew):
                    journal.begin(made_from)
                yield journal
    except BlockingIOError:
        raise UserError(f"another process is writing {path}: wait for it, or name another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _go_on(journal: Journal, path: Path, made_from: Mapping[str, Any], *, anew: bool) -> bool:
    """Find what is done, and cut off what a kill has left of a line; false where nothing is."""
    first = journal.file.readline(_LONGEST)
    start = f'{{"{_KEY}": '.encode()
    if not first.endswith(b"\n") and first[: len(start)] == start[: len(first)]:
        return False  # new, or killed at once
    before = (_row(first) or {}).get(_KEY)
    if before != made_from:
        if anew:
            return False
        if not isinstance(before, dict):
            raise UserError(
                f"{path} is there already, and nothing to go on with: move it, or replace it with --overwrite"
            )
        keys = [key for key in {**before, **made_from} if before.get(key) != made_from.get(key)]
        changes = "; ".join(f"{key}: {before.get(key)}, now {made_from.get(key)}" for key in keys)
        raise UserError(
            f"{path} holds what was done of something else ({changes}). Give the same again to go on, or begin anew "
            "with --overwrite or another name."
        )
    end = len(first)
    for line in journal.file:
        if _row(line) is None:
            break
        end += len(line)
        journal.done += 1
    journal.file.truncate(end)
    journal.file.seek(end)
    return True


def _row(line: bytes) -> Row | None:
    """What a whole line holds."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
