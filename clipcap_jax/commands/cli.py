"""What the verbs of the `clipcap` command share."""

import argparse
import contextlib
import difflib
import errno
import functools
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from clipcap_jax import signals
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen

# The arguments of `cluster.start`: name, what is taken when it is not given, and help.
_CLUSTER: list[tuple[str, Any, str]] = [
    ("coordinator_address", "", "HOST:PORT of process 0 [as JAX finds it]"),
    ("num_processes", 0, "how many processes work together, 1 for this one alone [as JAX finds them]"),
    ("process_id", -1, "this process's number, from 0 [as JAX finds it]"),
    ("lost_after", 60, "a process not heard of for so many seconds is lost, and all end [60]"),
]


def spellings(name: str) -> list[str]:
    """An option's: as commands have them, and with _ as the scripts have always had them."""
    return sorted({f"--{name.replace('_', '-')}", f"--{name}"})


def refuse(arguments: argparse.Namespace, others: Sequence[str], settings: Sequence[str] = ()) -> NoReturn:
    """End the program, with how its command is called, as that does not take these; `settings`: those it takes."""
    parser: argparse.ArgumentParser = arguments.parser
    hint = ""
    if others[0][:1] != "-":
        hint = f": the run's folder is --workdir={others[0]}" if "workdir" in arguments else ""
    elif meant := _meant(others[0].partition("=")[0], list(parser._option_string_actions), settings):
        hint = f": did you mean {' or '.join(meant)}?"
    parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")


def _meant(name: str, options: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The settings that end like an option that there is not, or else what is written much like it."""
    end = name.strip("-").replace("-", "_")
    close = functools.partial(difflib.get_close_matches, n=1, cutoff=0.75)
    if found := [setting for setting in settings if setting.endswith(f".{end}")] or close(name, options):
        return found
    ends = close(end, [setting.rpartition(".")[2] for setting in settings])
    return [setting for setting in settings if setting.rpartition(".")[2] in ends]


def add_cluster_options(command: argparse.ArgumentParser) -> None:
    """For a command of `clipcap`: the options of `start_processes`."""
    for name, default, text in _CLUSTER:
        command.add_argument(*spellings(name), type=type(default), default=default, help=text)


def add_overwrite_option(command: argparse.ArgumentParser) -> None:
    """For a command of `clipcap` that writes files: see `files.check_new`."""
    command.add_argument("--overwrite", action="store_true", help="replace the files that it writes if they are there")


def start_processes(options: Any, **console: Any) -> Console:
    """Let the processes of a script or command find each other; returns the console, on which the first alone prints.

    Args:
      options: the flags or options, as attributes.
      console: how it is made.

    Raises:
      UserError: see `cluster.start`.
    """
    from clipcap_jax import cluster, parallel

    parallel.keep_compiled_programs()
    cluster.start(*(getattr(options, name) for name, *_ in _CLUSTER))
    parallel.connect()
    return screen(quiet=not cluster.is_main(), **console)


class _Output(io.FileIO):
    """Standard output or error. Whether it can be written to decides nothing while there is work to do.

    Attributes:
      fault: why something that was to be seen was not.
    """

    fault: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:  # a pipe whose reader has ended, a terminal that is gone, a full disk
            self.fault = error
            return memoryview(content).nbytes


def unread() -> bool:
    """Whether what goes to the standard output does not arrive any more, as with `| head`."""
    return bool(getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "fault", None))


@contextlib.contextmanager
def _outputs() -> Iterator[None]:
    """What is shown decides nothing: any text can be, in any encoding, and whether it arrives is asked in the end.

    Raises:
      UserError: it did not, other than because nobody wanted it any more.
    """
    outputs = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not what a notebook or a test put there
            outputs[name] = _Output(stream.fileno(), "w", closefd=False)
            stream = io.TextIOWrapper(io.BufferedWriter(outputs[name]), stream.encoding, line_buffering=True)
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except SystemExit as ended:
        if ended.code:
            raise
    for name, output in outputs.items():
        getattr(sys, name).flush()
        if output.fault and output.fault.errno not in (errno.EPIPE, errno.EIO):
            raise UserError(f"not all was written to {name}: {output.fault.strerror}")


def run_script(main: Callable[[], Any], *, debug: bool = False) -> None:
    """Run a program; a `UserError` ends it with its message alone and status 2, a signal with 128 and its number.

    `debug`: with its traceback before the message.
    """
    try:
        with signals.end(), _others(), _outputs():
            main()
    except UserError as error:
        if debug:
            traceback.print_exc()
        screen(stderr=True).print(Text.assemble(("Error:", "red"), f" {error}"), soft_wrap=True)
        if any(map(_is_waited_for, threading.enumerate())):
            signals.leave(2)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as ended:
        status = ended.code if isinstance(ended, SystemExit) else 130
        if not isinstance(status, int) or status <= 128:
            raise
        screen(stderr=True).print("Stopped.")
        signals.leave(status)


def _is_waited_for(thread: threading.Thread) -> bool:
    """Whether Python would wait at its end for what nobody needs any more: a thread that compiles, or one of Orbax's,
    which after a save that failed wait ten minutes for what it was to make."""
    return type(thread).__module__.startswith("orbax.") or thread.name.startswith("compiler")


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """At the end, part from the other processes, if this one works with any; if it fails, all end with its reason."""
    try:
        yield
        ended: BaseException = SystemExit()
    except BaseException as error:
        ended = error
    cluster = sys.modules.get("clipcap_jax.cluster")  # to import it takes seconds
    if cluster and cluster.joined():
        if isinstance(ended, SystemExit) and not ended.code:
            cluster.leave()
        else:
            cluster.fail(ended)
    raise ended


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def cpus() -> int:
    """How many CPUs this process may use: a batch system or `taskset` may leave it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
