"""The one exception that means "the user can mend this", and how its messages name and count many things."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the user gave: a path, a config, a data set, a checkpoint.

    Its message says what is wrong and what to do. `train.py`, `evaluate.py` and `clipcap` print the message without a
    traceback and exit with status 2; in a library call it propagates like any exception.
    """


def first(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    named = ", ".join(names[:3])
    return named if len(names) <= 3 else f"{named} and {len(names) - 3} more"


def counted(count: int, noun: str) -> str:
    """Such as "1 picture" or "1,000 pictures"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
