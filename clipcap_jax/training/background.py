"""What is done beside the steps."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def regularly(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call it every so many seconds, in a thread, until this ends, which waits for a call that is under way."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
