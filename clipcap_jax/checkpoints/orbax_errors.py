"""What goes wrong in Orbax's threads, as soon as it does."""

import logging
import os
from collections.abc import Callable


class _OrbaxErrors(logging.Filter):
    """Hears the errors that Orbax logs, for whoever writes checkpoints, and keeps their tracebacks from the terminal.

    Orbax raises those of its threads in `wait`; but of several processes, the one that failed then waits ten minutes
    for the others, and these for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listeners: set[Callable[[BaseException], None]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not self.listeners or f"{os.sep}orbax{os.sep}" not in record.pathname:
            return True
        for listener in tuple(self.listeners):
            listener(error)
        return False


orbax_errors = _OrbaxErrors()
logging.getLogger("absl").addFilter(orbax_errors)
