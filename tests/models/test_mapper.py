import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from clipcap_jax.models.mapper import MapperConfig, MlpMapper, TransformerMapper

PAPER = MapperConfig("transformer", prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.0)
FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("mapper", "embedding_width", "millions"),
    [
        (MlpMapper, 640, 31.96),
        (TransformerMapper, 640, 42.73),
        (MlpMapper, 512, 31.47),
        (TransformerMapper, 512, 41.75),
    ],
)
def test_sizes_of_the_paper(mapper: type[MlpMapper | TransformerMapper], embedding_width: int, millions: float) -> None:
    """The paper's tables round the counts for RN50x4, 640 wide; the released code's ViT-B/32 is 512 wide."""
    model = mapper(PAPER, 768, FLOAT32)
    embedding = jax.ShapeDtypeStruct((2, embedding_width), jnp.float32)
    prefix, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), embedding)
    assert prefix.shape == (2, 10, 768)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6, 2) == millions


@pytest.mark.parametrize("mapper", [MlpMapper, TransformerMapper])
def test_a_prefix_depends_on_the_whole_of_its_own_embedding(mapper: type[MlpMapper | TransformerMapper]) -> None:
    model = mapper(dataclasses.replace(PAPER, prefix_length=4, clip_length=3, layers=1, heads=2), 8, FLOAT32)
    embedding = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    variables = model.init(jax.random.key(0), embedding)
    jacobian = jax.jit(jax.jacrev(lambda x: model.apply(variables, x).sum(axis=2)))(embedding)  # 2 4 2 5
    np.testing.assert_array_equal(jacobian != 0, np.broadcast_to(np.eye(2)[:, None, :, None], jacobian.shape))


@pytest.mark.parametrize("mapper", [MlpMapper, TransformerMapper])
def test_dropout_takes_entries_of_the_embedding(mapper: type[MlpMapper | TransformerMapper]) -> None:
    """Each prefix is that of the embedding with some of its entries dropped and the others made up for."""
    config = dataclasses.replace(PAPER, prefix_length=2, clip_length=2, layers=1, heads=2, dropout=0.25)
    model = mapper(config, 8, FLOAT32)
    kept = np.array(list(itertools.product((0, 1), repeat=3)))
    embedding = np.array([0.5, -1.5, 2.5], np.float32)
    apply = jax.jit(model.apply, static_argnames="deterministic")
    variables = {"params": random_params(model, 0, embedding[None])}
    possible = apply(variables, (embedding * kept / 0.75).astype(np.float32))
    rows = np.broadcast_to(embedding, (4000, 3))
    dropped = apply(variables, rows, deterministic=False, rngs={"dropout": jax.random.key(1)})
    distance = np.abs(dropped[:, None] - possible[None]).max(axis=(2, 3))
    assert distance.min(axis=1).max() < 1e-5
    found = kept[distance.argmin(axis=1)]
    np.testing.assert_allclose(found.mean(axis=0), 0.75, atol=0.03)  # 4 standard deviations


def test_fresh_parameters() -> None:
    """Kernels as torch.nn.Linear draws them, uniform up to 1 / sqrt(fan in), in each of the stacked layers as well."""
    model = TransformerMapper(dataclasses.replace(PAPER, prefix_length=40, layers=2), 64, FLOAT32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    layers = params["transformer"]["layers"]
    kernels = [(params["in"]["kernel"], 100)]
    for name, fan_in in (("qkv", 64), ("attention_out", 64), ("mlp_in", 64), ("mlp_out", 128)):
        kernels += [(kernel, fan_in) for kernel in layers[name]["kernel"]]
    for kernel, fan_in in kernels:
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not np.array_equal(*layers["qkv"]["kernel"])
    assert np.std(params["constants"]) == pytest.approx(1, rel=0.05)
