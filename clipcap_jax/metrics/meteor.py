"""METEOR (Denkowski & Lavie, 2014) by its authors' Java program, which the package pycocoevalcap brings along."""

import importlib.util
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.progress import track

_JAVA_OPTIONS = (
    "-Xmx2G",  # pycocoevalcap's limit; the paraphrase table alone needs a quarter of it
    "-XX:+UseSerialGC",  # one thread: the program has no use for more
    "-Dfile.encoding=UTF-8",
    "-Duser.language=en",  # the program reads back its own numbers and trips over a decimal comma
)
_START_SECONDS = 120.0  # to load the paraphrase table; five seconds on an idle machine
_SECONDS_PER_IMAGE = 0.5  # ten milliseconds on an idle machine


class Unavailable(Exception):
    """METEOR could not be computed; the message is the reason."""


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR of all captions together and of each image, from text tokenised by `ptb.tokenize`.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed or took too long.
    """
    command = [_java(), *_JAVA_OPTIONS, "-jar", str(_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    limit = _START_SECONDS + _SECONDS_PER_IMAGE * len(captions)
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as program,
    ):
        timer = threading.Timer(limit, program.kill)
        timer.start()
        try:
            return _converse(program, captions, references)
        except (OSError, ValueError) as error:  # a closed pipe; an answer cut short
            if not timer.is_alive():
                raise Unavailable(f"METEOR's Java program was stopped after {limit:.0f} seconds") from error
            program.kill()
            program.wait()
            raise Unavailable(f"METEOR's Java program failed: {_last_line(errors)}") from error
        finally:
            timer.cancel()
            program.kill()  # also after an interrupt: no Java is left behind


def _converse(
    program: subprocess.Popen[str], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The program's protocol: statistics for each image, then all statistics for the scores."""
    assert program.stdin is not None and program.stdout is not None

    def ask(command: str, *fields: str) -> None:
        program.stdin.write(" ||| ".join([command, *fields]) + "\n")
        program.stdin.flush()

    statistics = []
    for caption, texts in track(zip(captions, references, strict=True), "METEOR", total=len(captions), transient=True):
        ask("SCORE", *texts, caption)
        statistics.append(program.stdout.readline().strip())
    ask("EVAL", *statistics)
    per_image = [float(program.stdout.readline()) for _ in captions]
    return float(program.stdout.readline()), per_image


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise Unavailable("METEOR is a Java program and there is no `java` on the PATH; install a Java runtime")
    return java


def _jar() -> Path:
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise Unavailable("METEOR's Java program comes with pycocoevalcap: `pip install pycocoevalcap`")
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    if not jar.is_file():
        raise Unavailable(f"METEOR's Java program is missing from pycocoevalcap: there is no {jar}")
    return jar


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a message")
