"""Small models with random parameters, for tests that compute the same in two ways."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipcap_jax.models.clipcap import ClipCapConfig
from clipcap_jax.models.gpt2 import Gpt2Config
from clipcap_jax.models.mapper import MapperConfig

EMBEDDING_WIDTH = 6


def clipcap_config(
    *,
    mapper: Literal["mlp", "transformer"] = "mlp",
    vocab_size: int = 11,
    dropout: float = 0.1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ClipCapConfig:
    """Embeddings of width 6, a prefix of 3, a GPT-2 of 2 layers and width 16."""
    return ClipCapConfig(
        clip=None,
        mapper=MapperConfig(mapper, prefix_length=3, clip_length=2, layers=2, heads=2, dropout=dropout),
        gpt2=Gpt2Config(vocab_size, positions=32, width=16, layers=2, heads=2, dropout=dropout, word_dropout=dropout),
        normalize_embedding=False,
        dtype=dtype,
        matmul_precision="highest",
    )


def random_params(module: nn.Module, seed: int, *inputs: jax.Array | np.ndarray) -> Any:
    """Parameters that all matter: unlike fresh ones, biases are not 0, scales are not 1, and logits are far apart."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(random.normal(mean, 0.4, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def zero_params(module: nn.Module, *inputs: jax.Array | np.ndarray) -> Any:
    """For tests that make something else of a few of them."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)


def random_embeddings(seed: int, batch: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, EMBEDDING_WIDTH)).astype(np.float32)


def random_tokens(seed: int, *shape: int, vocab_size: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)
