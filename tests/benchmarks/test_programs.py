import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax import lax

from clipcap_jax.inputs.batches import LENGTHS, training_order


def formula(kind: programs.Kind, tokens: int) -> int:
    """FLOPs of a pair's step by hand: three times the forward products of what learns, two of what is only passed
    through, and none for the gradient of the embedding."""
    width, layers, vocabulary, prefix = 768, 12, 50304, 10  # 50257 tokens, padded
    positions = prefix + tokens - 1
    weights = positions * layers * 24 * width**2 + 2 * tokens * width * vocabulary
    attention = 4 * layers * positions**2 * width
    if kind == "mlp":
        first, second = 2 * 640 * 3840, 2 * 3840 * 7680
        return 3 * (weights + attention) + 2 * first + 3 * second
    first = 2 * 640 * prefix * width
    mapper = 20 * 8 * 16 * width**2 + 4 * 8 * 20**2 * width  # 8 layers at 20 positions, the MLP twice as wide
    return 2 * weights + 3 * attention + 2 * first + 3 * mapper


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize("tokens", [12, 20])
def test_flops_of_a_training_step(kind: programs.Kind, tokens: int) -> None:
    model = programs.captioner(kind)
    state, frozen = programs.training_state(model, programs.param_shapes(model))
    batch = programs.shapes_of(programs.random_batch(model, 4, tokens))
    found = programs.products(programs.training_step(model), state, frozen, batch)
    assert programs.flops(found) == 4 * formula(kind, tokens)
    trained = {"mlp": 156.40, "transformer": 42.73}[kind]  # millions, as in the paper's tables
    assert round(programs.size(state.params) / 1e6, 2) == trained


def test_products_of_every_kind() -> None:
    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y, _ = lax.scan(lambda carry, _: (carry @ carry, None), x, length=3)
        z = lax.while_loop(lambda z: z.sum() < 0, lambda z: z @ z, y.astype(jnp.bfloat16))
        images = lax.conv_general_dilated(jnp.ones((2, 8, 8, 5)), kernel, (2, 2), "SAME", dimension_numbers=NHWC)
        return z.sum().astype(jnp.float32) + images.sum()

    found = programs.products(function, jnp.ones((4, 4)), jnp.ones((3, 3, 5, 7)))
    assert sorted(found) == [
        programs.Product(2 * 4**3, looped=True, float32=False),
        programs.Product(3 * 2 * 4**3, looped=False, float32=True),
        programs.Product(2 * (2 * 4 * 4 * 7) * (3 * 3 * 5), looped=False, float32=True),
    ]
    assert programs.flops(found, looped=True) == 128


NHWC = ("NHWC", "HWIO", "NHWC")


def test_padded_lengths_are_those_of_training() -> None:
    assert len(programs.COCO_LENGTHS) == 25014
    assert set(programs.PADDED) < set(LENGTHS)
    order = training_order(programs.COCO_LENGTHS, 256, pool_batches=50, seed=0, epoch=0)
    longest = np.where(order < 0, 0, programs.COCO_LENGTHS[order]).max(axis=1)
    padded = np.array([min(length for length in LENGTHS if length >= most) for most in longest])
    for length, share in programs.PADDED.items():
        assert abs((padded == length).mean() - share) < 0.03
    assert min(programs.PADDED, key=lambda length: abs(length - padded.mean())) == programs.TOKENS


def test_a_batch_holds_the_captions_that_are_padded_to_its_length() -> None:
    lengths = programs.random_batch(programs.captioner("mlp", "tiny"), 500, 14)["lengths"]
    assert set(lengths.tolist()) == {13, 14}


def test_floors() -> None:
    machine = programs.Machine(product=100.0, copy=10.0)
    assert programs.training_floor(machine, operations=500, trained=5) == 5 + 14
    model = programs.captioner("mlp", "tiny")
    params = programs.size(programs.param_shapes(model))
    read = programs.size(programs.param_shapes(model)["gpt2"]) - 64 * 64  # but for the positions
    kept = [2 * 3 * (10 + generated * 5) * 2 * 64 for generated in (1, 2)]  # 3 pictures, 5 beams, 2 layers, width 64
    products = [programs.Product(7, looped=False, float32=True)]
    products.append(programs.Product(10**9, looped=True, float32=True))
    slow_memory = programs.captioning_floor(programs.Machine(1e30, 1.0), model, products, 3, beams=5, tokens=3)
    assert slow_memory == 2 * (params + 2 * read + sum(kept))  # bytes, 2 each
    slow_products = programs.captioning_floor(programs.Machine(1.0, 1e30), model, products, 3, beams=5, tokens=3)
    assert slow_products == 7 + 2 * 10**9
