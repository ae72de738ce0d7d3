import logging

import orbax.checkpoint
import pytest

from clipcap_jax.checkpoints.orbax_errors import orbax_errors


def record(path: str, error: Exception | None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("absl", logging.ERROR, path, 1, "a message", (), info)


def test_errors_of_orbax_are_heard_while_checkpoints_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is logged as it would be without."""
    heard: list[BaseException] = []
    error, path = OSError("no room"), orbax.checkpoint.__file__
    monkeypatch.setattr(orbax_errors, "listeners", set())
    absl = logging.getLogger("absl")
    assert absl.filter(record(path, error))
    orbax_errors.listeners.add(heard.append)
    assert absl.filter(record(path, None))
    assert absl.filter(record(__file__, error))
    assert heard == []
    assert not absl.filter(record(path, error))
    assert heard == [error]
