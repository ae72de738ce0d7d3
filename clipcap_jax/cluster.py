"""The processes that work together, on one host or many: how they start, wait for each other, and end.

Every two seconds each says, through JAX's service on process 0, that it lives. Whoever fails says why before it ends,
and process 0 misses whoever is not heard of any more: then all end with the reason, instead of waiting for ever in a
sum over devices that one of them will never join.
"""

import contextlib
import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed, xla_bridge  # not public; Orbax takes the client from here too

from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen

T = TypeVar("T")

_LOOK = 2.0  # seconds between two signs of life
_REASON = 2000  # characters of an error that may show whole arrays
_PATIENCE = 24 * 3600  # seconds that processes wait for each other: one may have more to do, but lives

_meetings = itertools.count()  # all processes hold them in the same order
_watch: "_Watch | None" = None  # of this process, where there are others


def start(coordinator_address: str = "", num_processes: int = 0, process_id: int = -1, lost_after: int = 60) -> None:
    """Let the processes of a cluster find each other, before any device is used; one alone needs nothing.

    JAX finds them by itself on Cloud TPUs, in SLURM, Open MPI and Kubernetes; elsewhere all three have to be given.

    Args:
      coordinator_address: host and port of process 0, "" where JAX finds it.
      num_processes: how many there are, 0 where JAX finds that; 1: this one works alone, whatever JAX would find.
      process_id: this one's number, from 0; -1 where JAX finds it.
      lost_after: seconds without a sign of life after which a process is taken for lost, and the others end.

    Raises:
      UserError: they do not find each other, or are fewer than was said.
    """
    global _watch
    if num_processes == 1:
        return
    given = bool(coordinator_address or num_processes or process_id >= 0)
    if not given and xla_bridge.backends_are_initialized():
        return  # a notebook or a test, that already computes alone
    if not given and "1" in map(os.environ.get, ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return  # JAX would take one GPU of the machine for the one process, and a port that another one may have
    try:
        jax.distributed.initialize(
            coordinator_address or None,
            num_processes or None,
            process_id if process_id >= 0 else None,
            # JAX's own watch ends a process with a stack trace: it is to come later than this module's, though it
            # counts from an older sign of life.
            heartbeat_timeout_seconds=2 * lost_after + 30,
            shutdown_timeout_seconds=_PATIENCE,
        )
    except ValueError as error:  # no cluster that JAX knows
        if given:
            raise UserError(
                f"the processes cannot start together: {error} Give all of --coordinator_address=HOST:PORT, "
                "--num_processes and --process_id, or none of them."
            ) from error
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot start together: {error}. --num_processes=1 lets this one work alone."
        ) from error
    if num_processes and count() != num_processes:
        raise UserError(f"{num_processes} processes were to start together, but there are {count()}")
    if count() > 1:
        _watch = _Watch(lost_after)
        _watch.start()


def index() -> int:
    """This process's number, from 0; its devices take that block of every batch."""
    return jax.process_index()


def count() -> int:
    """How many processes share every batch."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this is the one process that prints, logs and writes files."""
    return index() == 0


def meet() -> None:
    """Wait until all processes are here.

    Raises:
      UserError: one did not come for a day; it is named.
    """
    if count() == 1:
        return
    client: Any = distributed.global_state.client
    try:
        _wait(client.wait_at_barrier, f"meeting/{next(_meetings)}", _PATIENCE * 1000)
    except RuntimeError as error:
        raise UserError(f"the processes waited for each other for {_PATIENCE} s: {error}") from error


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """What process 0 does first, and the others after it: they find it done."""
    if not is_main():
        meet()
    yield
    if is_main():
        meet()


def check_same(what: str, value: str) -> None:
    """Raise a UserError unless all processes have the same of something, which they then do not tell each other."""
    if count() == 1:
        return
    client: Any = distributed.global_state.client
    key = f"same/{next(_meetings)}"
    client.key_value_set(f"{key}/{index()}", hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest())
    meet()
    if len({digest for _, digest in client.key_value_dir_get(key)}) > 1:
        raise UserError(f"the processes have different {what}: start all with the same flags, from the same files")


def of_first(value: T) -> T:
    """What process 0 has of something that JSON can hold, on all processes."""
    if count() == 1:
        return value
    client: Any = distributed.global_state.client
    key = f"first/{next(_meetings)}"
    if is_main():
        client.key_value_set(key, json.dumps(value))
    found: T = json.loads(_wait(client.blocking_key_value_get, key, _PATIENCE * 1000))
    return found


def collect(blocks: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """The blocks of all processes on process 0: the first of each one, in their order, then the second, and so on.

    Blocks are lists of what JSON can hold, as many from each process. None waits for another but process 0; there
    alone anything comes out.
    """
    client: Any = distributed.global_state.client
    for number, block in enumerate(blocks):
        if not is_main():
            client.key_value_set(f"blocks/{number}/{index()}", json.dumps(block))
            continue
        yield block
        for other in range(1, count()):
            key = f"blocks/{number}/{other}"
            yield json.loads(_wait(client.blocking_key_value_get, key, _PATIENCE * 1000))
            client.key_value_delete(key)


def joined() -> bool:
    """Whether this process works with others, and has not parted from them; then what follows can be called."""
    return _watch is not None


def leave() -> None:
    """Wait until all processes are done, and part from them."""
    global _watch
    assert _watch
    try:
        _wait(jax.distributed.shutdown)
    finally:
        _watch.end()
        _watch = None


def before_the_end(action: Callable[[], None]) -> None:
    """Have something done when all processes end as one has failed or is lost, and nothing is closed."""
    if _watch:
        _watch.last.append(action)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What processes do together: an error of one ends all, before it closes what might wait for the others."""
    try:
        yield
    except BaseException as error:
        if joined():
            fail(error)
        raise


def fail(error: BaseException) -> NoReturn:
    """End this process with an error, and all others with this one as the reason."""
    assert _watch
    code, reason = 1, f"{type(error).__name__}: {error}"[:_REASON]
    match error:
        case UserError():
            code, reason = 2, str(error)
        case KeyboardInterrupt():
            code, reason = 130, "it was interrupted"
        case SystemExit():
            code, reason = error.code if isinstance(error.code, int) else 1, f"it was stopped ({error.code})"
        case jax.errors.JaxRuntimeError() | ValueError() if "RESOURCE_EXHAUSTED" not in str(error):
            _watch.wait_for_reason(reason)  # as it may be of a sum over devices that another process was to join
    if code == 1:
        traceback.print_exception(error)
    _print(f"Error: {reason}")
    _watch.tell(f"process {index()} of {count()}: {reason}", code)
    _watch.end_process(code)


class _Watch(threading.Thread):
    """Says that this process lives, and ends it with the reason when another one has failed or is lost."""

    def __init__(self, lost_after: int):
        super().__init__(daemon=True)
        self._lost_after = lost_after
        self._client: Any = distributed.global_state.client
        self._ended = threading.Event()
        self.last: list[Callable[[], None]] = []  # done before it ends
        self._say_nothing = _say_after_death(
            f"Process {index()} of {count()} was ended from outside: killed, perhaps for want of memory, or by JAX, "
            "which does so where process 0 was lost. The same command goes on from the last checkpoint."
        )

    def run(self) -> None:
        signs = {f"alive/{other}": "" for other in range(count() if is_main() else 1)}
        missed: Counter[str] = Counter()  # looks since then. Not seconds: this process may have slept itself
        for look in itertools.count():
            if self._ended.wait(_LOOK):
                return
            try:
                self._client.key_value_set(f"alive/{index()}", str(look), allow_overwrite=True)
                told = [text for name, text in self._client.key_value_dir_get("told/") if name != f"told/{index()}"]
                now = dict(self._client.key_value_dir_get("alive/")) if is_main() else {"alive/0": str(look)}
            except RuntimeError:
                told, now = [], {}
            if told:
                code, _, reason = told[0].partition(" ")
                _print(f"Error: {reason}")
                self.end_process(int(code))
            for name in {*signs, *now}:
                missed[name] = 0 if name in now and now[name] != signs.get(name) else missed[name] + 1
            signs |= now
            for name, looks in missed.items():
                if looks * _LOOK > self._lost_after:
                    reason = (
                        f"process {name.removeprefix('alive/')} of {count()} was lost: it was not heard of for "
                        f"{self._lost_after} s. The same command goes on from the last checkpoint."
                    )
                    self.tell(reason, 1)
                    _print(f"Error: {reason}")
                    self.end_process(1)

    def tell(self, reason: str, code: int) -> None:
        """Let the other processes end with a reason, which this one does by itself."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):  # process 0 is gone
            self._client.key_value_set(f"told/{index()}", f"{code} {reason}")

    def wait_for_reason(self, error: str) -> None:
        """After an error that may be another's: wait to be ended with that one's reason."""
        _print(f"{error}\nPerhaps because another process was lost: waiting to hear of one.")
        time.sleep(self._lost_after + 5 * _LOOK)

    def end_process(self, code: int) -> NoReturn:
        """End this process without waiting for the others, as JAX would."""
        self.end()
        for action in self.last:
            with contextlib.suppress(Exception):  # what matters is that it ends
                action()
        if is_main():
            time.sleep(3 * _LOOK)  # it is from here that the others hear of it
        os._exit(code)

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._say_nothing()


def _wait(function: Callable[..., T], *arguments: Any) -> T:
    """Call what waits for other processes, in a thread: in it, a signal would be heeded only afterwards."""
    ended: queue.SimpleQueue[tuple[Any, RuntimeError | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            ended.put((function(*arguments), None))
        except RuntimeError as error:
            ended.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    result: T
    result, error = ended.get()
    if error:
        raise error
    return result


def _print(text: str) -> None:
    console = screen(stderr=True)
    console.show_cursor()  # a progress bar hid it
    console.print(text, style="red", soft_wrap=True)
    sys.stdout.flush()


def _say_after_death(text: str) -> Callable[[], None]:
    """Have a text printed if this process ends before it calls what this returns, however it ends.

    JAX ends a process by itself when process 0 is lost, with a stack trace that no exception handler sees.
    """
    speaker = subprocess.Popen(
        ["sh", "-c", 'read line || echo "$0" >&2', text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )

    def say_nothing() -> None:
        with contextlib.suppress(OSError, ValueError):  # it ended first, by a signal to the whole group; or was told
            speaker.communicate("\n")

    return say_nothing
