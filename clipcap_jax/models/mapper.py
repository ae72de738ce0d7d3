"""The mapping networks from a CLIP embedding to a GPT-2 prefix (arXiv 2111.09734, section 3.2; original `train.py`)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipcap_jax.models.transformer import Hooks, Transformer

# torch's default for Linear kernels, which the original's mappers start from.
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class MapperConfig:
    """Which mapper, and its sizes.

    `prefix_length` is P; `dropout` is the rate, on the embedding's entries, while the mapper trains, which the paper
    does not have. The rest is read by the transformer alone: `clip_length` is C, the tokens made from the embedding;
    the paper has 8 layers of 8 heads and an MLP twice as wide as the language model.
    """

    kind: Literal["mlp", "transformer"]
    prefix_length: int
    clip_length: int
    layers: int
    heads: int
    dropout: float


def _dense(module: "MlpMapper | TransformerMapper") -> Callable[..., nn.Dense]:
    """What makes a mapper's linear layers, whose parameters are whole when they are used."""
    whole = nn.map_variables(nn.Dense, "params", module.hooks.whole, init=module.is_initializing())
    return functools.partial(whole, dtype=module.dtype, kernel_init=TORCH_LINEAR)


class MlpMapper(nn.Module):
    """Linear - tanh - Linear, the hidden layer half as wide as the prefix."""

    config: MapperConfig
    width: int
    dtype: jnp.dtype
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`B E` to the prefix, `B P D`; unless `deterministic`, with dropout."""
        embedding = nn.Dropout(self.config.dropout, deterministic=deterministic)(embedding)
        prefix_width = self.config.prefix_length * self.width
        dense = _dense(self)
        x = self.hooks.rows(dense(prefix_width // 2, name="in")(embedding))
        x = self.hooks.rows(dense(prefix_width, name="out")(jnp.tanh(x)))
        return x.reshape(-1, self.config.prefix_length, self.width)  # B P D


class TransformerMapper(nn.Module):
    """C tokens made from the embedding and P learned constants through a transformer; the last P come out."""

    config: MapperConfig
    width: int
    dtype: jnp.dtype
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`B E` to the prefix, `B P D`; unless `deterministic`, with dropout."""
        config, batch = self.config, embedding.shape[0]
        embedding = nn.Dropout(config.dropout, deterministic=deterministic)(embedding)
        x = self.hooks.rows(_dense(self)(config.clip_length * self.width, name="in")(embedding))
        x = x.reshape(batch, config.clip_length, self.width)  # B C D
        constants = self.param("constants", nn.initializers.normal(1.0), (config.prefix_length, self.width))
        constants = self.hooks.whole(constants.astype(self.dtype))
        constants = jnp.broadcast_to(constants, (batch, *constants.shape))
        x = jnp.concatenate([x, constants], axis=1)  # B C+P D
        x = Transformer(
            width=self.width,
            layers=config.layers,
            heads=config.heads,
            mlp_width=2 * self.width,
            activation=jax.nn.relu,
            qkv_bias=False,
            kernel_init=TORCH_LINEAR,
            residual_init=TORCH_LINEAR,
            dtype=self.dtype,
            hooks=self.hooks,
            name="transformer",
        )(x)
        return x[:, config.clip_length :]  # B P D


MAPPERS: dict[str, Callable[..., nn.Module]] = {"mlp": MlpMapper, "transformer": TransformerMapper}
