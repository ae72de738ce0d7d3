"""METEOR (Denkowski & Lavie, 2014) by its authors' Java program, which the package pycocoevalcap brings along."""

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import track

_JAVA_OPTIONS = (
    "-Xmx2G",  # pycocoevalcap's limit; the table of paraphrases alone needs a quarter of it
    "-XX:+UseSerialGC",  # one thread: the program has no use for more
    "-Dfile.encoding=UTF-8",
    "-Duser.language=en",  # the program reads back its own numbers and trips over a decimal comma
)
_START_SECONDS = 120.0  # to load the table of paraphrases: seven seconds on two cores
_IMAGE_SECONDS = 0.1  # one millisecond on two cores


class Unavailable(Exception):
    """METEOR could not be computed; the message is the reason."""


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR of all captions together and of each image, from text tokenised by `ptb.tokenize_all`.

    Raises:
      Unavailable: Java or pycocoevalcap is missing, or the program failed or took too long.
    """
    command = [_find_java(), *_JAVA_OPTIONS, "-jar", str(_find_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    limit = _START_SECONDS + _IMAGE_SECONDS * len(captions)
    with tempfile.TemporaryFile() as errors:  # not a pipe, which blocks the program while nobody reads it
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
        )
        timer = threading.Timer(limit, program.kill)
        timer.start()
        try:
            return _converse(program, captions, references)
        except (OSError, EOFError, ValueError) as error:  # a broken pipe, no answer, or one that is no number
            if not timer.is_alive():
                raise Unavailable(f"METEOR's Java program was stopped after {limit:.0f} seconds") from error
            _end(program)
            raise Unavailable(f"METEOR's Java program failed: {_last_line(errors)}") from error
        finally:  # an interrupt, too, leaves no Java behind
            timer.cancel()
            _end(program)


def _converse(
    program: subprocess.Popen[str], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Asks for statistics of each image, then with all of them for the scores."""
    stdin, stdout = program.stdin, program.stdout
    assert stdin is not None
    assert stdout is not None

    def ask(*fields: str) -> None:
        stdin.write(" ||| ".join(field.replace("|||", "") for field in fields) + "\n")
        stdin.flush()

    def answer() -> str:
        if line := stdout.readline():
            return line.strip()
        raise EOFError

    statistics = []
    images = zip(captions, references, strict=True)
    for caption, texts in track(images, "METEOR", total=len(captions), console=Console(stderr=True), transient=True):
        ask("SCORE", *texts, caption)
        statistics.append(answer())
    ask("EVAL", *statistics)
    per_image = [float(answer()) for _ in captions]
    return float(answer()), per_image


def _end(program: subprocess.Popen[str]) -> None:
    program.kill()
    for pipe in (program.stdin, program.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what could not be sent cannot be flushed either
            pipe.close()
    program.wait()


def _find_java() -> str:
    if java := shutil.which("java"):
        return java
    raise Unavailable("METEOR is a Java program and there is no `java` on the PATH: install a Java runtime")


def _find_jar() -> Path:
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise Unavailable('METEOR needs Java, and its program: pip install "clipcap_jax[java]"')
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    if not jar.is_file():
        raise Unavailable(f"METEOR's Java program should have come with pycocoevalcap, but there is no {jar}")
    return jar


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a message")
