import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcap_jax import cluster, parallel
from clipcap_jax.errors import UserError
from clipcap_jax.training.loss import caption_loss

DEVICES = 4
BATCH = 8

RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.normal(size=(5, 7)).astype(np.float32)
CAPTIONS = {
    "inputs": RANDOM.normal(size=(BATCH, 6, 5)).astype(np.float32),
    "tokens": RANDOM.integers(0, 7, (BATCH, 6), dtype=np.int32),
    # The devices have 12, 1, 2 and 0 tokens.
    "lengths": np.array([6, 6, 1, 0, 1, 1, 0, 0], np.int32),
}


def loss(weights: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of a linear model, as its sum and the count of tokens."""
    return caption_loss(batch["inputs"] @ weights, batch["tokens"], batch["lengths"])


def test_there_are_several_devices() -> None:
    assert parallel.device_count() == jax.local_device_count() == DEVICES
    assert parallel.describe_devices() == "4 cpu devices"
    assert (cluster.index(), cluster.count()) == (0, 1)


@pytest.mark.parametrize("batch_size", [4, 8, 400])
def test_batch_sizes_that_divide(batch_size: int) -> None:
    parallel.check_batch_size(batch_size, "config.train.batch_size")


@pytest.mark.parametrize("batch_size", [-4, 0, 1, 6, 401])
def test_batch_sizes_that_do_not(batch_size: int) -> None:
    message = f"config.train.batch_size is {batch_size}: it has to be a multiple of the 4 devices"
    with pytest.raises(UserError, match=re.escape(message)):
        parallel.check_batch_size(batch_size, "config.train.batch_size")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "nearest"),
    [(3, 1, "such as 4"), (6, 1, "such as 4 or 8"), (40, 4, "times config.train.accumulation=4, such as 32 or 48")],
)
def test_batch_sizes_that_would_do_are_named(batch_size: int, accumulation: int, nearest: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{nearest}. ")):
        parallel.check_batch_size(batch_size, "config.train.batch_size", accumulation)
    parallel.check_batch_size(int(nearest.split()[-1]), "config.train.batch_size", accumulation)


@given(st.integers(1, 10**6))
def test_round_up(batch_size: int) -> None:
    rounded = parallel.round_up(batch_size)
    parallel.check_batch_size(rounded, "")
    assert batch_size <= rounded < batch_size + DEVICES


def test_replicate() -> None:
    tree = {"a": WEIGHTS, "b": [np.int32(3), np.arange(4, dtype=np.uint32)]}
    copies = parallel.replicate(tree)
    jax.tree.map(np.testing.assert_array_equal, copies, tree)
    for ours, theirs in zip(jax.tree.leaves(copies), jax.tree.leaves(tree), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.is_fully_replicated
        assert ours.devices() == set(jax.devices())


def test_map_rows_keeps_the_order() -> None:
    def rows(offset: jax.Array, batch: Any) -> Any:
        here = jnp.full(batch["x"].shape[0], parallel.device_index())
        return {"x": 2 * batch["x"] + offset, "sums": batch["y"].sum(axis=(1, 2)), "device": here}

    x, y = np.arange(BATCH), RANDOM.integers(0, 9, (BATCH, 2, 3))
    found = parallel.map_rows(rows)(np.int32(5), {"x": x, "y": y})
    np.testing.assert_array_equal(found["x"], 2 * x + 5)
    np.testing.assert_array_equal(found["sums"], y.sum(axis=(1, 2)))
    np.testing.assert_array_equal(found["device"], [0, 0, 1, 1, 2, 2, 3, 3])  # each has its own share
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def test_map_sum_equals_one_device() -> None:
    total, count = parallel.map_sum(loss)(WEIGHTS, CAPTIONS)
    expected, tokens = jax.jit(loss)(WEIGHTS, CAPTIONS)
    assert count == tokens == 15
    assert total.shape == count.shape == ()
    np.testing.assert_allclose(total, expected, rtol=1e-6)

    # What it must not be: the mean of the devices' means, over those that have any tokens.
    shares = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], CAPTIONS) for i in range(3)]
    means = [total / count for total, count in (jax.jit(loss)(WEIGHTS, share) for share in shares)]
    assert abs(np.mean(means) - expected / tokens) > 0.1


@pytest.mark.parametrize("count", [2, 4])
def test_a_program_for_shapes_alone(count: int) -> None:
    """Its devices need not be all there are; it computes what the function called at once does."""
    mapped = parallel.map_sum(loss, jax.devices()[:count])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (WEIGHTS, CAPTIONS))
    lowered = mapped.lower(*shapes)
    assert lowered.in_avals[0][1]["inputs"].shape == (count, BATCH // count, 6, 5)
    split = {name: x.reshape(count, BATCH // count, *x.shape[1:]) for name, x in CAPTIONS.items()}
    found = jax.block_until_ready(lowered.compile()(WEIGHTS, split))
    expected = loss(jnp.asarray(WEIGHTS), jax.tree.map(jnp.asarray, CAPTIONS))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_map_step_equals_one_device() -> None:
    """Three steps of gradient descent, on captions spread so unevenly that one device has none."""
    rate = np.float32(0.5)

    def step(state: Any, rate: jax.Array, batch: Any) -> Any:
        (total, tokens), grads = jax.value_and_grad(loss, has_aux=True)(state["weights"], batch)
        total, tokens, grads = parallel.sum_over_devices((total, tokens, grads))
        new = {"weights": state["weights"] - rate * grads / tokens, "step": state["step"] + 1}
        return new, {"loss": total / tokens}

    take_step = parallel.map_step(step)
    state = parallel.replicate({"weights": WEIGHTS, "step": np.int32(0)})
    weights = jnp.asarray(WEIGHTS)
    for _ in range(3):
        state, metrics = take_step(state, rate, CAPTIONS)
        (total, tokens), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, CAPTIONS)
        weights = weights - rate * grads / tokens
        np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-5)
    assert state["step"] == 3
    np.testing.assert_allclose(state["weights"], weights, atol=1e-6)
    assert np.abs(weights - WEIGHTS).max() > 0.1
    assert state["weights"].is_fully_replicated


def test_a_step_is_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    """For the state that it is first given as for those that it returns."""

    def step(state: Any, constants: Any, batch: Any) -> Any:
        return state + parallel.sum_over_devices(batch["inputs"].sum()), constants

    take_step = parallel.map_step(step)
    state, constants = parallel.replicate((np.float32(0), np.float32(1)))
    with jax.log_compiles():
        for _ in range(3):
            state, _ = take_step(state, constants, CAPTIONS)
    assert sum("Finished XLA compilation" in record.getMessage() for record in caplog.records) == 1


def test_of_what_all_devices_hold_one_copy_is_saved() -> None:
    copies = parallel.replicate(WEIGHTS)
    (divided,) = jax.tree.leaves(parallel.FullySharded().place({"kernel": np.zeros((1024, 1024), np.float32)}))
    assert not divided.is_fully_replicated
    saved, whole = parallel.for_saving((copies, divided))
    assert len(saved.devices()) == 1
    assert saved.unsafe_buffer_pointer() == copies.addressable_data(0).unsafe_buffer_pointer()
    assert whole is divided


def double(constants: Any, batch: Any) -> Any:
    return {"x": 2 * batch["x"], "device": jnp.full(batch["x"].shape[0], parallel.device_index())}


def test_sent_batches_are_not_sent_again() -> None:
    batch: dict[str, Any] = {
        "x": np.arange(BATCH, dtype=np.float32),
        "y": RANDOM.normal(size=(BATCH, 2, 3)).astype(np.float16),
    }
    sent = parallel.send(batch)
    mapped = parallel.map_rows(double)
    constants = parallel.replicate(np.int32(0))
    mapped(constants, batch)  # compiled
    with jax.transfer_guard("disallow"), jax.transfer_guard_device_to_host("allow"):
        found = mapped(constants, sent)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            mapped(constants, batch)
    np.testing.assert_array_equal(found["x"], 2 * batch["x"])
    np.testing.assert_array_equal(found["device"], [0, 0, 1, 1, 2, 2, 3, 3])
    for name, leaf in sent.items():
        assert leaf.dtype == batch[name].dtype
        for i, shard in enumerate(leaf.addressable_shards):
            assert shard.device == jax.local_devices()[i]
            np.testing.assert_array_equal(shard.data, batch[name][None, 2 * i : 2 * i + 2])


def test_sent_batches_give_what_others_give() -> None:
    sent, mapped = parallel.send(CAPTIONS), parallel.map_sum(loss)
    for _ in range(2):  # they are not used up
        np.testing.assert_array_equal(mapped(WEIGHTS, sent), mapped(WEIGHTS, CAPTIONS))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_are_sent_one_ahead(count: int) -> None:
    asked: list[int] = []

    def batches() -> Any:
        for i in range(count):
            asked.append(i)
            yield {"x": np.full(BATCH, i)}

    seen = []
    for sent in parallel.send_ahead(batches()):
        seen.append(int(sent["x"][0, 0]))
        assert len(asked) == min(len(seen) + 1, count)
    assert seen == list(range(count))


COMPILE = """
import jax
from clipcap_jax import parallel
parallel.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize("home_can_be_written", [True, False])
def test_compiled_programs_are_kept(tmp_path: Path, home_can_be_written: bool) -> None:
    home = tmp_path / "home"
    if not home_can_be_written:
        home.write_text("a file, where no folder can be made")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", COMPILE], env={**environment, "XDG_CACHE_HOME": str(home)}, check=True)
    kept = list((home / "clipcap_jax" / platform.node()).iterdir()) if home_can_be_written else []
    assert any("lambda" in path.name for path in kept) == home_can_be_written


def test_jax_s_own_setting_comes_first(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
    assert any("lambda" in path.name for path in tmp_path.iterdir())
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 8, 12), (3, 8, 3)),  # the largest axis
        ((3, 8, 13), (3, 2, 13)),  # that can be divided
        ((8, 8), (2, 8)),
        ((3, 6, 10), (3, 3, 5)),  # two of them, where none can by 4
        ((50257, 6), (50257, 3)),  # one by 2
        ((50257, 5), (50257, 5)),  # none can
        ((), ()),
    ],
)
def test_how_arrays_are_divided(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    assert parallel.FullySharded(whole_below=0).sharding(array).shard_shape(shape) == expected
    assert parallel.FullySharded(whole_below=array.nbytes + 1).sharding(array).is_fully_replicated


def test_sharded_arrays() -> None:
    layout = parallel.FullySharded(whole_below=0)
    tree = {"a": RANDOM.normal(size=(8, 3)).astype(np.float32), "b": [np.int32(3), np.arange(3)]}
    placed = layout.place(tree)
    doubled = layout.placed(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree))(placed)
    whole = layout.on_every_device(placed)
    for found, times in ((placed, 1), (doubled, 2), (whole, 1)):
        jax.tree.map(
            lambda leaf, expected, times=times: np.testing.assert_array_equal(leaf, times * expected), found, tree
        )
    for sharded in (placed, doubled):
        assert [shard.data.shape for shard in sharded["a"].addressable_shards] == [(2, 3)] * 4
    assert all(leaf.sharding == parallel.replicate(leaf).sharding for leaf in jax.tree.leaves(whole))


def test_sharded_batches_are_sent_once() -> None:
    layout = parallel.FullySharded(whole_below=0)
    step = layout.map_step(lambda state, constants, batch: (state + batch["x"].sum(), batch["x"].max()))
    batch = {"x": np.arange(BATCH, dtype=np.float32)}
    sent, state = layout.send(batch), layout.place(np.float32(0))
    assert [shard.data.tolist() for shard in sent["x"].addressable_shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    state, _ = step(state, {}, batch)  # compiled
    with jax.transfer_guard("disallow"):
        state, largest = step(state, {}, sent)
    assert (float(state), float(largest)) == (56, 7)
