"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a path, a config, a data set, a checkpoint.

    Its message says what is wrong and what to do. `train.py`, `evaluate.py` and `clipcap` print the message without a
    traceback and exit with status 2; in a library call it propagates like any exception.
    """
