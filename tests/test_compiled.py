import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipcap_jax import parallel, progress

LAYOUTS = [parallel.DATA_PARALLEL, parallel.FullySharded(whole_below=0)]


def squares(constants: Any, batch: Any) -> Any:
    return constants * (batch["x"] ** 2).sum()


def shapes(*arguments: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)


@contextlib.contextmanager
def counting(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is compiled meanwhile."""
    found: list[str] = []
    caplog.clear()
    jax.config.update("jax_log_compiles", True)  # in all threads, as `jax.log_compiles` is not
    try:
        yield found
    finally:
        jax.config.update("jax_log_compiles", False)
    found += [text for record in caplog.records if "Finished XLA compilation" in (text := record.getMessage())]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["data", "fsdp"])
def test_what_was_begun_is_not_compiled_again(layout: parallel.Layout, caplog: pytest.LogCaptureFixture) -> None:
    def step(state: Any, constants: Any, batch: Any) -> Any:
        return state + layout.sum_over_devices((batch["x"] * constants).sum()), {}

    take_step = layout.map_step(step)
    state, constants = layout.place((jnp.float32(0), jnp.float32(2)))
    short, long = (layout.send({"x": np.ones((8, length), np.float32)}) for length in (3, 5))
    state, _ = take_step(state, constants, short)
    with counting(caplog) as compiled, futures.ThreadPoolExecutor(1) as executor:
        take_step.begin(executor, *shapes(state, constants, long))
    assert len(compiled) == 1
    with counting(caplog) as compiled:
        for batch in (long, long, short):
            state, _ = take_step(state, constants, batch)
    assert compiled == []
    assert float(state) == 2 * (24 + 40 + 40 + 24)


def test_what_is_known_is_not_begun() -> None:
    program, batch = parallel.map_sum(squares), parallel.send({"x": np.ones((4, 7), np.float32)})
    program(parallel.replicate(np.float32(1)), batch)
    with futures.ThreadPoolExecutor(1) as executor:
        program.begin(executor, "no shapes", batch)
    assert program(parallel.replicate(np.float32(2)), batch) == 2 * 28  # does not meet what would have failed


def test_a_call_waits_for_what_was_begun() -> None:
    program, batch = parallel.map_sum(squares), parallel.send({"x": np.ones((4, 6), np.float32)})
    constants, ready, found = parallel.replicate(np.float32(1)), threading.Event(), []
    with futures.ThreadPoolExecutor(1) as executor:
        executor.submit(ready.wait)  # comes before it
        program.begin(executor, *shapes(constants, batch))
        thread = threading.Thread(target=lambda: found.append(program(constants, batch)))
        thread.start()
        thread.join(0.2)
        assert not found
        ready.set()
        thread.join()
    assert found == [24]


def test_what_cannot_be_compiled_fails_when_it_is_called() -> None:
    program = parallel.map_sum(lambda constants, batch: constants @ batch["x"])
    constants, batch = parallel.replicate(np.ones((5, 5))), parallel.send({"x": np.ones((4, 3))})
    with futures.ThreadPoolExecutor(1) as executor:
        program.begin(executor, *shapes(constants, batch))
    with pytest.raises(TypeError, match="5"):
        program(constants, batch)


def test_who_waits_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    program, batch = parallel.map_sum(squares, name="squares of numbers"), {"x": np.ones((4, 9), np.float32)}
    program(np.float32(1), batch)
    assert capsys.readouterr().err.splitlines()[-1].startswith("Compiling squares of numbers: ")
    program(np.float32(1), batch)
    assert capsys.readouterr() == ("", "")
