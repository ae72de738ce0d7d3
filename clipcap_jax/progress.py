"""What is shown on the screen: texts as they are, and how far a long piece of work is."""

import contextlib
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_hidden = threading.Event()
_PATIENCE = 2.0  # seconds that need no explanation


def hide() -> None:
    """Show no bars from now on, and nothing of what is waited for."""
    _hidden.set()


def is_hidden() -> bool:
    """Whether `hide` was called."""
    return _hidden.is_set()


def screen(**options: Any) -> Console:
    """A console, with options of rich's, that shows texts as they are: a folder may be called "[lr=1e-4]" or "[/x]"."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def bar(console: Console | None = None, *, disable: bool = False, **options: Any) -> Progress:
    """A bar with how many are done of how many, the time taken and the time left; with options of rich's."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or screen(),
        disable=disable or is_hidden(),
        **options,
    )


def track(items: Iterable[T], description: str, *, total: int, done: int = 0, **options: Any) -> Generator[T]:
    """The items, which a bar counts, from `done` on; with options of rich's.

    A loop over them that can fail closes it (`contextlib.closing`), or the bar goes on under the message.
    """
    with bar(**options) as shown:
        task = shown.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            shown.advance(task)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say on the standard error what is waited for, if that takes more than two seconds, and in the end how long."""
    console = screen(stderr=True, quiet=is_hidden())  # while a bar is shown, rich puts it above that
    timer = threading.Timer(_PATIENCE, lambda: console.print(f"{what} ...", soft_wrap=True))
    timer.daemon = True
    timer.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # what it may be saying comes before what follows
    if (taken := time.perf_counter() - began) > _PATIENCE:
        console.print(f"{what}: {taken:.0f} s", soft_wrap=True)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without Orbax's and TFDS's, which tell every step of a save and a restore, and what is meant so."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
