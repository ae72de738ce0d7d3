import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from random_models import random_params, zero_params

from clipcap_jax.models.transformer import Transformer

ZEROS = nn.initializers.zeros


def transformer(dropout: float = 0.0) -> Transformer:
    return Transformer(
        width=8,
        layers=2,
        heads=2,
        mlp_width=16,
        activation=jax.nn.relu,
        kernel_init=ZEROS,
        residual_init=ZEROS,
        dropout=dropout,
        dtype=jnp.dtype("float32"),
    )


def drop(model: Transformer, params: Any, x: jax.Array) -> jax.Array:
    apply = jax.jit(functools.partial(model.apply, deterministic=False))
    return apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})


def test_layers_equal_their_formula() -> None:
    """One position attends to itself alone, so that a block is x + out(value(norm(x))), then x + mlp(norm(x))."""
    x = np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32)
    model = transformer()
    params = random_params(model, 0, x)
    expected = x.astype(np.float64)
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), params["layers"])

        def dense(name: str, x: np.ndarray, layer: dict = layer) -> np.ndarray:
            return x @ layer[name]["kernel"] + layer[name]["bias"]

        def norm(name: str, x: np.ndarray, layer: dict = layer) -> np.ndarray:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            return x * layer[name]["scale"] + layer[name]["bias"]

        value = dense("qkv", norm("norm_1", expected))[..., 16:]
        expected = expected + dense("attention_out", value)
        expected = expected + dense("mlp_out", np.maximum(dense("mlp_in", norm("norm_2", expected)), 0))
    actual = model.apply({"params": params}, x)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_without_a_mask_every_position_sees_every_other() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    model = transformer()
    params = random_params(model, 0, x)
    jacobian = jax.jit(jax.jacrev(lambda x: model.apply({"params": params}, x).sum(axis=2)))(x)  # 2 4 2 4 8
    seen = np.abs(jacobian).max(axis=4) > 0  # image, position, image seen, position seen
    np.testing.assert_array_equal(seen, np.broadcast_to(np.eye(2)[:, None, :, None], seen.shape))


def test_attention_weights_drop_out_before_what_they_add_does() -> None:
    """Of 4 positions that are all 1, each takes a quarter, dropped or doubled; the sum is dropped or doubled again."""
    x = jnp.zeros((2000, 4, 8))
    model = transformer(dropout=0.5)
    params = zero_params(model, x)
    params["layers"]["qkv"]["bias"] = params["layers"]["qkv"]["bias"].at[0, 16:].set(1)  # the first layer's values
    params["layers"]["attention_out"]["kernel"] = params["layers"]["attention_out"]["kernel"].at[0].set(jnp.eye(8))
    y = drop(model, params, x)
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_array_equal(values, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(counts / y.size, np.array([16 + 1, 4, 6, 4, 1]) / 32, atol=0.02)  # 5 standard deviations


def test_every_branch_of_every_layer_has_its_own_dropout_mask() -> None:
    """2 branches of 2 layers each add 1, dropped or doubled: the sum is binomial only if the masks are independent."""
    x = jnp.zeros((50, 40, 8))
    model = transformer(dropout=0.5)
    params = zero_params(model, x)
    for branch in ("attention_out", "mlp_out"):
        params["layers"][branch]["bias"] = jnp.ones((2, 8))
    y = drop(model, params, x)
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_array_equal(values, [0, 2, 4, 6, 8])
    np.testing.assert_allclose(counts / y.size, np.array([1, 4, 6, 4, 1]) / 16, atol=0.02)  # 5 standard deviations
