"""How far a long piece of work is, on the screen."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def bar(**options: Any) -> Progress:
    """A bar with how many are done of how many, the time taken and the time left; with options of rich's."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        **options,
    )


def track(items: Iterable[T], description: str, *, total: int, done: int = 0, **options: Any) -> Iterator[T]:
    """The items, which a bar counts, from `done` on; with options of rich's."""
    with bar(**options) as shown:
        task = shown.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            shown.advance(task)
