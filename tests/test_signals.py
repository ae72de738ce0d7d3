"""Each in a process of its own, whose main thread is where Python's handlers do not reach it."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from clipcap_jax import signals

# Hours of work in C, which no signal interrupts, as XLA's compiler has.
PROGRAM = """
import hashlib, os, signal, sys, time
for number in (signal.SIGINT, signal.SIGHUP):  # the test may run under nohup
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
from clipcap_jax import signals
from clipcap_jax.commands.cli import run_script

def ready():
    os.write(1, b"ready\\n")  # which a signal cannot come into the midst of

def compile():
    ready()
    signals.PATIENCE = 0.5
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def main():
"""


@contextlib.contextmanager
def running(main: str) -> Iterator[subprocess.Popen[str]]:
    program = PROGRAM + textwrap.indent(main, "    ") + "\nrun_script(main)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_does_not_come_back(number: signal.Signals) -> None:
    with running("compile()") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "Stopped.\n")


def test_what_comes_back_cleans_up() -> None:
    with running("try: ready(); time.sleep(600)\nfinally: print('clean')") as process:
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors) == (130, "clean\n", "Stopped.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_python_drops_comes_again(number: signal.Signals) -> None:
    main = f"class Garbage:\n  def __del__(self): signal.raise_signal({number})\n"
    with running(main + "try: ready(); Garbage(); time.sleep(600)\nfinally: print('clean')") as process:
        printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors) == (128 + number, "clean\n", "Stopped.\n")


def test_other_exceptions_that_python_drops() -> None:
    main = "class Garbage:\n  def __del__(self): raise error\n"
    for error in ("ValueError('bad')", "SystemExit(255)"):
        with running(f"error = {error}\n{main}ready(); Garbage(); time.sleep(0.5)") as process:
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors.startswith("Exception ignored in: ")
        assert error.replace("(", ": ").strip(")").replace("'", "") in errors


def test_a_mistake_waits_for_no_thread_that_compiles() -> None:
    main = "from concurrent import futures\nfrom clipcap_jax.errors import UserError\nready()\n"
    main += "futures.ThreadPoolExecutor(1, 'compiler').submit(time.sleep, 600)\nraise UserError('bad')"
    with running(main) as process:
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "Error: bad\n")


def test_asked_to_stop_it_answers_at_once_and_a_second_time_ends() -> None:
    with running("with signals.stop(lambda: print('answer', flush=True)): compile()") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "answer\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "Stopped.\n")


def test_other_threads_hear_of_no_signal() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def work() -> None:
        with signals.stop(lambda: None) as asked:
            found.append(asked.is_set())
            found.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    found: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, *handlers]
