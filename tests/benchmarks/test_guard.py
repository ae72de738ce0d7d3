"""What must not grow unseen: figures of the programs that are the same on every machine.

A change that is meant to move one of them moves the number here too. What devices send each other in a step is held in
test_scaling.py.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import programs
import pytest
import tpu_compile
from tiny import Clipcap, Source, make_config, train

BEAMS = 5
TOKENS = 20


def share_in_float32(found: list[programs.Product]) -> float:
    """Of the FLOPs."""
    return programs.flops([product for product in found if product.float32]) / programs.flops(found)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_step_in_bfloat16_multiplies_in_bfloat16(kind: programs.Kind) -> None:
    """But for the gradients of attention's scores, whose softmax is float32."""
    model = programs.captioner(kind)
    state, frozen = programs.training_state(model, programs.param_shapes(model))
    batch = programs.shapes_of(programs.random_batch(model, 40, programs.TOKENS))
    found = programs.products(programs.training_step(model), state, frozen, batch)
    assert 0 < share_in_float32(found) < 0.003


def test_a_search_in_bfloat16_multiplies_in_bfloat16() -> None:
    model = programs.captioner("mlp")
    inputs = jax.ShapeDtypeStruct((32, programs.EMBEDDING), "float32")
    found = programs.products(programs.best_captions(model, BEAMS, TOKENS), programs.param_shapes(model), inputs)
    assert share_in_float32(found) == 0


@pytest.mark.parametrize(
    ("program", "most"),
    [
        (lambda: tpu_compile.training("mlp", "tiny", rows=64, dtype="float32"), 50e6),
        (lambda: tpu_compile.training("transformer", "tiny", rows=64, dtype="float32"), 95e6),
        (lambda: tpu_compile.captioning("tiny", None, "float32"), 29.1e6),
    ],
    ids=["training the MLP mapper and GPT-2", "training the transformer mapper", "captioning"],
)
def test_memory_beside_arguments_and_results(program: Callable[[], tpu_compile.Program], most: float) -> None:
    """In bytes, as compiled for a CPU: 5% above what it was."""
    if jax.config.read("jax_disable_most_optimizations"):
        pytest.skip("programs that are not optimised take more memory")
    line = tpu_compile.attempt(program(), jax.devices()[:1], sys.maxsize)
    assert 0.5 * most < line["memory"]["temporaries"] < most


def compiled(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often programs were compiled, by name."""
    lines = [record.getMessage() for record in caplog.records]
    return Counter(line.split()[4] for line in lines if line.startswith("Finished XLA compilation of"))


def test_programs_of_a_training_and_of_captioning(
    data_dir: Path,
    source: Source,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    clipcap: Clipcap,
    request: pytest.FixtureRequest,
) -> None:
    """One for the steps, one for the losses of a validation, one for its captions, the rest small ones for the start;
    over four devices, with checkpoints. The pictures make batches of 4, 4 and 2."""
    run = tmp_path / "run"
    jax.config.update("jax_log_compiles", True)  # in all threads, unlike `jax.log_compiles`
    request.addfinalizer(lambda: jax.config.update("jax_log_compiles", False))
    train(run, make_config(data_dir, {}, "pixels"))
    assert 3 < compiled(caplog).total() <= 12, compiled(caplog)

    caplog.clear()
    jax.clear_caches()
    pictures = sorted(source.pictures.iterdir())[:10]
    assert clipcap("caption", run, *pictures, "--batch-size", 4, "--output", tmp_path / "captions.jsonl") == 0
    assert compiled(caplog).total() == 1, compiled(caplog)
