"""Java, for the two scores whose reference is a Java program."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import IO

# English numbers, whatever the user's language: the programs trip over a decimal comma.
_OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en")


class Unavailable(Exception):
    """A score could not be computed; the message is the reason."""


def find(score: str, at_least: int) -> str:
    """The Java program.

    Args:
      score: what it is for, to be named in the message.
      at_least: the oldest version that will do, such as 11.

    Raises:
      Unavailable: there is none, or it is too old.
    """
    java = shutil.which("java")
    if java is None:
        raise Unavailable(
            f"{score} is a Java program and there is no `java` on the PATH: install a Java runtime, {at_least} or later"
        )
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{score} is a Java program, and {java} does not start: {error}") from error
    version = re.search(r'version "(?:1\.)?(\d+)', run.stderr)  # "17.0.15"; "1.8.0_392" is Java 8
    if version is None:
        raise Unavailable(f"{score} is a Java program, and {java} -version prints no version: {run.stderr.strip()}")
    if int(version[1]) < at_least:
        raise Unavailable(f"{score} needs Java {at_least} or later; {java} is Java {version[1]}")
    return java


def pycocoevalcap(score: str, *parts: str) -> Path:
    """A file that the package pycocoevalcap brings along.

    Raises:
      Unavailable: the package or the file is not there.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise Unavailable(f'{score} needs Java, and its program: pip install "clipcap_jax[java]"')
    file = Path(package.submodule_search_locations[0]).joinpath(*parts)
    if not file.exists():
        raise Unavailable(f"{score}'s Java program should have come with pycocoevalcap, but there is no {file}")
    return file


def run(
    score: str, java: str, arguments: Sequence[str], *, lines: Iterable[str] = (), seconds: float
) -> Generator[str, None, None]:
    """Start a Java program, hand it lines, and give what it prints, line by line, until it ends.

    It never outlives this generator: close it (`contextlib.closing`) and the program is gone, after an interrupt too.

    Args:
      score: what the program computes, for messages.
      java: as `find` gives it.
      arguments: what follows Java's general options.
      lines: what the program reads, without line breaks.
      seconds: after which it is stopped.

    Raises:
      Unavailable: it failed, as its standard error says, or the time was up.
    """
    with tempfile.TemporaryFile() as errors:  # not a pipe, which blocks the program while nobody reads it
        try:
            program = subprocess.Popen(
                [java, *_OPTIONS, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "LC_ALL": "C.UTF-8"},  # what Java reads file names by
                start_new_session=True,  # as `java` may be a script that starts the program
            )
        except OSError as error:
            raise Unavailable(f"{score}'s Java program does not start: {error}") from error
        stdin, stdout = program.stdin, program.stdout
        assert stdin is not None
        assert stdout is not None
        # In a thread of its own, or both would wait: the program for its answers to be read, this for it to read on.
        feeder = threading.Thread(target=_feed, args=(stdin, lines), daemon=True)
        in_time = True

        def stop() -> None:
            nonlocal in_time
            in_time = False
            _kill(program)

        timer = threading.Timer(seconds, stop)
        try:
            feeder.start()
            timer.start()
            for line in stdout:
                yield line.rstrip("\n")
            program.wait()
        finally:
            timer.cancel()
            _kill(program)
            program.wait()
            feeder.join()
            stdout.close()
        if not in_time:
            raise Unavailable(f"{score}'s Java program was stopped after {seconds:.0f} seconds")
        if program.returncode:
            raise Unavailable(f"{score}'s Java program failed: {_reason(errors)}")


def _kill(program: subprocess.Popen[str]) -> None:
    """With all that it started; nothing of it may be left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def _feed(stdin: IO[str], lines: Iterable[str]) -> None:
    with contextlib.suppress(OSError), stdin:  # a program that has ended says why by itself
        for line in lines:
            stdin.write(line + "\n")


def _reason(errors: IO[bytes]) -> str:
    """The exception that it tells of, or else its last words."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    exceptions = [
        line for line in lines if re.match(r"(Exception in |Caused by: |[\w.]+\.\w+(Exception|Error)\b)", line)
    ]
    return (exceptions or lines[-1:] or ["it ended without a message"])[0]
