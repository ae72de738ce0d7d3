import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipcap_jax.metrics import java
from clipcap_jax.metrics.java import Unavailable


def run(program: Path, lines: list[str] | None = None, seconds: float = 30.0) -> list[str]:
    return list(java.run("X", str(program), [], lines=lines or [], seconds=seconds))


def test_what_it_prints_comes_line_by_line(fake_java: Callable[[str], Path]) -> None:
    assert run(fake_java("tr a-z A-Z"), ["a dog", "", "é"]) == ["A DOG", "", "é"]


def test_more_than_a_pipe_holds(fake_java: Callable[[str], Path]) -> None:
    lines = ["a dog runs " * 100] * 5_000
    assert run(fake_java("cat"), lines) == lines


def test_the_version_is_checked(fake_java: Callable[..., Path]) -> None:
    program = fake_java("", version='openjdk version "17.0.15" 2025-04-15')
    assert java.find("X", at_least=17) == str(program)
    with pytest.raises(Unavailable, match=r"X needs Java 18 or later; .*java is Java 17"):
        java.find("X", at_least=18)
    fake_java("", version='java version "1.8.0_392"')
    assert java.find("X", at_least=8)
    with pytest.raises(Unavailable, match="is Java 8"):
        java.find("X", at_least=9)
    fake_java("", version="Error: no libjvm.so")
    with pytest.raises(Unavailable, match=r"prints no version: Error: no libjvm\.so"):
        java.find("X", at_least=8)


def test_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="X is a Java program and there is no `java` on the PATH"):
        java.find("X", at_least=8)


def test_no_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r'pip install "clipcap_jax\[java\]"'):
        java.pycocoevalcap("X", "meteor")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo Could not reserve enough space >&2; echo >&2; exit 1", "Could not reserve enough space"),
        (
            "echo started >&2; echo 'java.lang.OutOfMemoryError: heap' >&2; echo '	at edu.X(X.java)' >&2; exit 1",
            "java.lang.OutOfMemoryError: heap",
        ),
        ("exit 1", "it ended without a message"),
        ("kill -9 $$", "it ended without a message"),
    ],
)
def test_a_failing_program_is_quoted(fake_java: Callable[[str], Path], script: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=f"X's Java program failed: {reason}"):
        run(fake_java(script), ["a line that nobody reads"] * 100_000)


def test_a_hanging_program_is_stopped(fake_java: Callable[[str], Path]) -> None:
    start = time.monotonic()
    with pytest.raises(Unavailable, match="X's Java program was stopped after 1 seconds"):
        run(fake_java("exec sleep 60"), seconds=1.0)
    assert time.monotonic() - start < 30


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # that has ended, though nobody has asked how


def has_ended(process: int) -> bool:
    for _ in range(100):  # a signal takes a moment to arrive
        if not is_running(process):
            return True
        time.sleep(0.05)
    return False


def test_a_closed_generator_leaves_no_program_behind(fake_java: Callable[[str], Path]) -> None:
    with contextlib.closing(java.run("X", str(fake_java("echo $$; exec sleep 60")), [], seconds=60)) as lines:
        process = int(next(lines))
        assert is_running(process)
    assert has_ended(process)


def test_a_script_that_starts_the_program_leaves_none_behind(fake_java: Callable[[str], Path]) -> None:
    with contextlib.closing(java.run("X", str(fake_java("sleep 60 & echo $!; wait")), [], seconds=60)) as lines:
        process = int(next(lines))
    assert has_ended(process)
    with pytest.raises(Unavailable, match="stopped after 1 seconds"):
        run(fake_java("sleep 60; exit"), seconds=1.0)


@pytest.mark.parametrize("signal", ["INT", "TERM", "HUP"])
def test_a_command_that_is_stopped_leaves_no_program_behind(fake_java: Callable[[str], Path], signal: str) -> None:
    code = (
        "import signal, sys; from clipcap_jax.commands import cli; from clipcap_jax.metrics import java\n"
        # Whoever runs the tests may have them ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "cli.run_script(lambda: [print(line, flush=True) for line in java.run('X', sys.argv[1], [], seconds=60)])"
    )
    program = fake_java("echo $$; exec sleep 60")
    with subprocess.Popen([sys.executable, "-c", code, str(program)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        process = int(command.stdout.readline())
        subprocess.run(["kill", f"-{signal}", str(command.pid)], check=True)
        assert command.wait(30) == {"INT": 130, "TERM": 143, "HUP": 129}[signal]
    assert has_ended(process)
