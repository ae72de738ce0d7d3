"""What the `clipcap` command and the two scripts share."""

import argparse
import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
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


def define_cluster_flags() -> None:
    """For a script with absl's flags: those of `start_processes`."""
    for name, default, text in _CLUSTER:
        define: Any = flags.DEFINE_string if isinstance(default, str) else flags.DEFINE_integer
        define(name, default, text)


def add_cluster_options(command: argparse.ArgumentParser) -> None:
    """For a command of `clipcap`: the options of `start_processes`."""
    for name, default, text in _CLUSTER:
        names = {f"--{name.replace('_', '-')}", f"--{name}"}  # as all options of commands, and as the scripts' flags
        command.add_argument(*sorted(names), type=type(default), default=default, help=text)


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
    except SystemExit as ended:  # as absl ends every script
        if ended.code:
            raise
    for name, output in outputs.items():
        getattr(sys, name).flush()
        if output.fault and output.fault.errno not in (errno.EPIPE, errno.EIO):
            raise UserError(f"not all was written to {name}: {output.fault.strerror}")


def run_script(main: Callable[[], Any]) -> None:
    """Run a program; a `UserError` ends it with its message alone and status 2, a signal with 128 and its number."""
    try:
        with signals.end(), _others(), _outputs():
            main()
    except UserError as error:
        screen(stderr=True).print(Text.assemble(("Error:", "red"), f" {error}"), soft_wrap=True)
        if any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
            os._exit(2)  # after a save that failed, they wait ten minutes for what it was to make
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as ended:
        status = ended.code if isinstance(ended, SystemExit) else 130
        if not isinstance(status, int) or status <= 128:
            raise
        screen(stderr=True).print("Stopped.")
        signals.leave(status)


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
        if isinstance(ended, SystemExit) and not ended.code:  # as absl ends every script
            cluster.leave()
        else:
            cluster.fail(ended)
    raise ended


def run_flags_script(main: Callable[[list[str]], None]) -> None:
    """Run a program that has absl flags, `ml_collections` configs among them, as `run_script` does."""

    def parse(arguments: list[str]) -> list[str]:
        for argument in arguments:  # ml_collections tells what is wrong with one too late, and at length
            name, _, value = argument.partition("=")
            if name.lstrip("-") == "config" and value and not Path(value.split(":")[0]).is_file():
                raise UserError(f"there is no config file {value.split(':')[0]}")
        try:
            _, *others = parsed = flags.FLAGS(arguments)
            if others:
                raise UserError(f"{' '.join(others)}: only flags are taken, such as --workdir={others[0]}")
            return parsed
        except flags.Error as error:
            raise UserError(str(error)) from error
        except ValueError as error:
            if not str(error).startswith("Override "):
                raise
            raise UserError(str(error)) from error
        except AttributeError as error:
            # A setting that does not exist; ml_collections' own message is in the KeyError that it wraps.
            if not (error.args and isinstance(error.args[0], KeyError)):
                raise  # from the user's config file, whose line the traceback shows
            raise UserError(f"the config has no setting {error.args[0].args[0]}") from error

    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save and a restore
    run_script(lambda: app.run(main, flags_parser=parse))


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
