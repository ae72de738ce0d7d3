"""Signals that ask a program to stop are answered at once. Python itself hears of one only when the main thread is back
from whatever it has called, and XLA may compile for minutes."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PATIENCE = 3.0  # seconds that the main thread has to be back in Python
_back = threading.Event()  # it was, and has heard of the signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Handlers = dict[int, Any]


def leave(status: int) -> NoReturn:
    """End the process as it is: to take down Python in order crashes where XLA was interrupted while it compiled."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def end() -> Iterator[None]:
    """A signal ends what is done inside by an exception, so that what was started is stopped, and what was written half
    is removed: Ctrl-C by KeyboardInterrupt, SIGTERM and SIGHUP by SystemExit. Where the main thread is not back in
    Python after some seconds, the process ends without."""
    hook, sys.unraisablehook = sys.unraisablehook, _once_more
    try:
        with _handled(lambda _: _end), _listened(_end_soon):
            yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def stop(answer: Callable[[], None]) -> Iterator[threading.Event]:
    """The first signal sets the event, and a thread calls `answer`; a second does what it did outside.

    In other threads than the main one, no signal does.
    """
    asked = threading.Event()
    answered: set[int] = set()

    def ask(previous: Any) -> Callable[[int, Any], None]:
        def handler(number: int, _: Any) -> None:
            asked.set()
            signal.signal(number, previous)

        return handler

    def listen(number: int) -> None:
        if number not in answered:
            answered.add(number)
            answer()
        elif previous[number] is _end:
            _end_soon(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    with _handled(ask) as previous, _listened(listen):
        yield asked


def _end(number: int, _: Any) -> NoReturn:
    _back.set()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _end_soon(number: int) -> None:
    if not _back.wait(PATIENCE):
        sys.stderr.write("Stopped.\n")
        leave(128 + number)
    _back.clear()


def _once_more(dropped: Any) -> None:
    """Python drops what is raised while it collects garbage: the signal comes again when it has."""
    error = dropped.exc_value
    came = [signal.SIGINT] if isinstance(error, KeyboardInterrupt) else []
    if isinstance(error, SystemExit):
        came = [number for number in _SIGNALS if error.code == 128 + number]
    for number in came:
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number)).start()
    if not came:
        sys.__unraisablehook__(dropped)


@contextlib.contextmanager
def _handled(handler: Callable[[Any], Any]) -> Iterator[Handlers]:
    """With a handler for each signal, made from the one before, all of which it gives; but for those that are ignored,
    as nohup has it."""
    previous: Handlers = {number: found for number in _SIGNALS if (found := signal.getsignal(number)) != signal.SIG_IGN}
    for number, found in previous.items():
        signal.signal(number, handler(found))
    try:
        yield previous
    finally:
        for number, found in previous.items():
            signal.signal(number, found)


@contextlib.contextmanager
def _listened(answer: Callable[[int], None]) -> Iterator[None]:
    """A thread calls `answer` with each signal's number, when it comes."""
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] in _SIGNALS:
                answer(number[0])

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        thread.join()
        heard.close()
