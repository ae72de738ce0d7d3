"""CLIP's text transformer (Radford et al. 2021, section 2.4; openai/CLIP, clip/model.py, `CLIP.encode_text`)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipcap_jax.models.clip_vit import clip_transformer
from clipcap_jax.models.transformer import EPSILON


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of the tower. `context_length` is the longest text in tokens, its start and end included; `embedding_width`
    is E, the same as the vision tower's."""

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embedding_width: int


class ClipText(nn.Module):
    """Tokens to CLIP embeddings."""

    config: ClipTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embed texts.

        Args:
          tokens: int `B T`, T at most `config.context_length`; each row a text from its start token to its end token,
            whose id is the greatest of all, and then anything.

        Returns:
          float32 `B E`: the projection of the first end token's position, not normalised.
        """
        config = self.config
        length = tokens.shape[1]
        init = nn.initializers.normal(config.width**-0.5)
        token_embeddings = self.param("token_embeddings", init, (config.vocab_size, config.width))
        positions = self.param("positions", init, (config.context_length, config.width))
        x = (token_embeddings[tokens] + positions[None, :length]).astype(self.dtype)  # B T width
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]  # 1 1 T T
        x = clip_transformer(config.width, config.layers, config.heads, self.dtype)(x, causal)
        end = jnp.argmax(tokens, axis=1)  # as the original finds it
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # B width
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="final_norm")(x)
        x = nn.Dense(config.embedding_width, use_bias=False, kernel_init=init, dtype=self.dtype, name="projection")(x)
        return x.astype(jnp.float32)  # B E
