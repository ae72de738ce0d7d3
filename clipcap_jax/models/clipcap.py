"""ClipCap: the CLIP tower, the mapper and GPT-2 joined (arXiv 2111.09734; original `train.py`, `ClipCaptionModel`)."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipcap_jax.models.clip_resnet import ClipResnet, ClipResnetConfig
from clipcap_jax.models.clip_vit import ClipVit, ClipVitConfig, normalize_pixels
from clipcap_jax.models.gpt2 import Cache, Gpt2, Gpt2Config, Reader
from clipcap_jax.models.mapper import MAPPERS, MapperConfig
from clipcap_jax.models.transformer import Hooks

ClipConfig = ClipVitConfig | ClipResnetConfig


@dataclasses.dataclass(frozen=True)
class ClipCapConfig:
    """The whole model.

    Attributes:
      clip: the vision tower, or None for a model that reads stored embeddings only.
      mapper, gpt2: the other two parts.
      normalize_embedding: whether embeddings are scaled to unit length before the mapper.
      dtype: what matrix products and activations are computed in; parameters, norms and logits are float32.
      matmul_precision: JAX's name for it. A float32 product is bfloat16 passes on a TPU, and may be TF32 on a GPU,
        unless this is "highest".
    """

    clip: ClipConfig | None
    mapper: MapperConfig
    gpt2: Gpt2Config
    normalize_embedding: bool
    dtype: Literal["float32", "bfloat16"]
    matmul_precision: Literal["default", "high", "highest"]


def tower(config: ClipConfig, dtype: jnp.dtype) -> ClipVit | ClipResnet:
    """The vision tower of these sizes."""
    if isinstance(config, ClipResnetConfig):
        return ClipResnet(config, dtype)
    return ClipVit(config, dtype)


def _in_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Trace a method of ClipCap under its config's matmul precision; gradients inherit it."""

    @functools.wraps(method)
    def wrapped(self: "ClipCap", *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(self.config.matmul_precision):
            return method(self, *args, **kwargs)

    return wrapped


class ClipCap(nn.Module):
    """Images or embeddings and caption tokens in, logits out.

    `inputs` is throughout either uint8 images, `B H W 3`, or stored embeddings, float `B E`. The parameters' top
    level is `clip` (absent without a tower), `mapper`, `gpt2`: what training's `trainable` names. `hooks` reach the
    mapper and GPT-2, not the tower.
    """

    config: ClipCapConfig
    hooks: Hooks = Hooks()

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.clip = None if config.clip is None else tower(config.clip, dtype)
        self.mapper = MAPPERS[config.mapper.kind](config.mapper, config.gpt2.width, dtype, self.hooks)
        self.gpt2 = Gpt2(config.gpt2, dtype, self.hooks)

    @_in_precision
    def embed(self, images: jax.Array) -> jax.Array:
        """uint8 images `B H W 3` to CLIP embeddings, float32 `B E`, not normalised."""
        if self.clip is None:
            raise ValueError("this model has no vision tower: it reads embeddings, not images")
        return self.clip(normalize_pixels(images))

    @_in_precision
    def prefix(self, inputs: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`inputs` to the vectors that GPT-2 reads first, `B P D`; unless `deterministic`, with dropout."""
        embedding = self.embed(inputs) if inputs.ndim == 4 else inputs.astype(jnp.float32)  # B E
        if self.config.normalize_embedding:
            embedding = embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        return self.mapper(embedding, deterministic=deterministic)

    @_in_precision
    def __call__(self, inputs: jax.Array, tokens: jax.Array, *, dropout: Collection[str] = ()) -> jax.Array:
        """Teacher-forced logits at the caption positions only.

        Args:
          inputs: images or embeddings.
          tokens: int `B T`, padded on the right with any valid id.
          dropout: the parts ("mapper", "gpt2") that drop out, for which the "dropout" rng is needed.

        Returns:
          float32 `B T V`; those at t predict `tokens[:, t]`.
        """
        prefix = self.prefix(inputs, deterministic="mapper" not in dropout)
        deterministic = "gpt2" not in dropout
        caption = self.gpt2.embed(tokens[:, :-1], deterministic=deterministic)
        embeddings = jnp.concatenate([prefix, caption], axis=1)  # B L-1 D
        hidden = self.gpt2(embeddings, deterministic=deterministic)
        return self.gpt2.logits(hidden[:, prefix.shape[1] - 1 :])  # B T V

    @_in_precision
    def prefill(self, inputs: jax.Array, slots: int, prompt: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Logits of the first token, float32 `B V`, and a cache whose first of `slots` slots hold the P vectors of the
        prefix and, if there is one, the prompt's tokens, int `Q`, the same for all."""
        prefix = self.prefix(inputs)
        if prompt is not None:
            words = self.gpt2.embed(prompt[None])  # 1 Q D
            prefix = jnp.concatenate([prefix, jnp.repeat(words, len(prefix), axis=0)], axis=1)  # B P+Q D
        return self.gpt2.prefill(prefix, slots)

    def reader(self) -> Reader:
        """GPT-2's parameters, for `extend`."""
        return self.gpt2.reader()

    @_in_precision
    def extend(
        self, reader: Reader, tokens: jax.Array, position: jax.Array, slot: jax.Array, mask: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """One more token of each hypothesis: see `Gpt2.extend`."""
        return self.gpt2.extend(reader, tokens, position, slot, mask, cache)
