import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hlo
import jax
import programs
import pytest
import scaling
import tpu_compile

from clipcap_jax import parallel

SCRIPT = Path(scaling.__file__)
ROOT = SCRIPT.parents[1]


def tiny(layout: str) -> Callable[[], tpu_compile.Program]:
    return functools.partial(tpu_compile.training, "mlp", "tiny", 2, layout, "float32")


@pytest.fixture
def all_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model this small nothing would be, otherwise."""
    monkeypatch.setattr(parallel, "FullySharded", functools.partial(parallel.FullySharded, whole_below=0))


@pytest.mark.parametrize("count", [2, 4])
def test_data_parallelism_exchanges_the_gradients_once_and_nothing_else(count: int) -> None:
    line = scaling.count_bytes(tiny("data"), "cpu", count)
    gradients, loss_and_tokens = 4 * line["trained"], 8
    assert [found["kind"] for found in line["collectives"]] == ["all-reduce"]
    assert line["collectives"][0]["bytes"] == gradients + loss_and_tokens
    assert line["sent"] == line["least"] == 2 * (count - 1) * (gradients + loss_and_tokens) // count


@pytest.mark.usefixtures("all_divided")
def test_divided_state_is_gathered_a_layer_at_a_time() -> None:
    program = tiny("fsdp")()
    shapes = (
        *program.constants,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype), program.batch),
    )
    text = program.mapped(program.function, jax.devices()[:4]).lower(*shapes).compile().as_text()
    module = hlo.Module(str(text))
    assert module.partitions == 4
    in_loops: Counter[tuple[int, ...]] = Counter()
    for visit in module.walk():
        exchange = module.collective(visit)
        if exchange and exchange.kind == "all-gather" and visit.looped:
            in_loops.update({shape.dims: visit.times for shape in exchange.shapes})
    layers = 2
    stacked = program.constants[0].params["gpt2"]["transformer"]["layers"]
    matrices = [leaf.shape for leaf in jax.tree.leaves(stacked) if len(leaf.shape) == 3]
    assert len(matrices) == 4
    # Each layer's share of every matrix, in the forward pass and again in the backward pass; no stack of several.
    assert {dims: times for dims, times in in_loops.items() if len(dims) == 3} == {
        (1, *shape[1:]): 2 * layers for shape in matrices
    }


@pytest.mark.usefixtures("all_divided")
def test_the_least_of_divided_state_is_three_times_its_bytes() -> None:
    program = tiny("fsdp")()
    layout = parallel.FullySharded(tuple(jax.devices()[:4]))
    divided = sum(
        leaf.size
        for leaf in jax.tree.leaves(program.constants[0].params)
        if layout.sharding(leaf).shard_shape(leaf.shape) != leaf.shape
    )
    least, formula = scaling.least_sent(program, 4)
    assert 0.99 * program.trained < divided <= program.trained
    assert least == 3 * (12 * divided + 8 * (program.trained - divided)) // 4
    assert f"3 x 4 x {divided}" in formula
    line = scaling.count_bytes(tiny("fsdp"), "cpu", 4)
    # This compiler sums gradients whole, where a reduce-scatter would do: four parts for three.
    assert 1 < line["sent"] / line["least"] < 4 / 3 + 0.1


def test_divided_state_takes_less_of_a_device(all_divided: None) -> None:
    whole, parts = (scaling.count_memory(tiny(layout), "cpu", 4)["memory"]["arguments"] for layout in ("data", "fsdp"))
    trained = programs.size(tiny("data")().constants[0].params)
    assert whole > 12 * trained
    assert 3 * trained < parts < 3.2 * trained


def run(*options: str) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, SCRIPT, "--tiny", *options], env=environment, text=True)
    return [json.loads(text) for text in output.splitlines()]


def test_processes_take_steps_together() -> None:
    (line,) = run("--only", "steps/fsdp/2x1")
    assert (line["case"], line["processes"], line["devices"]) == ("steps/fsdp/2x1", 2, 2)
    assert 0 < line["seconds"] == line["spread"][0] <= line["spread"][1]
    assert line["busy"] > 0


def test_a_process_that_fails_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="1 processes with 1 devices each failed"):
        scaling.time_steps("pipelined", 1, 1, tiny=True)
    assert "KeyError: 'pipelined'" in capfd.readouterr().err


@pytest.mark.slow
def test_all_of_it() -> None:
    lines = run("--only", "steps/", "/cpu/")
    names = [name for name, _ in scaling.cases(tiny=True) if "/tpu/" not in name]
    assert [line["case"] for line in lines] == names
