"""GPT-2 (Radford et al. 2019; openai/gpt-2, src/model.py) that reads embeddings and decodes with an explicit cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipcap_jax.models.transformer import EPSILON, Hooks, LayerCache, Layers, Transformer

Cache = tuple[LayerCache, ...]


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Sizes of the language model: `vocab_size` V, `width` D, `layers` N; `positions` is the longest L.

    Rates while training: `dropout` on embeddings, attention weights and residual branches; `word_dropout` of a
    caption's tokens that are hidden, so that more has to be read from the prefix (Bowman et al. 2016, arXiv 1511.06349,
    section 3.3.1). These put an unknown word there, of which GPT-2 has none: here it is an embedding of zeros.
    """

    vocab_size: int
    positions: int
    width: int
    layers: int
    heads: int
    dropout: float
    word_dropout: float


def _preset(width: int, layers: int, heads: int) -> Gpt2Config:
    return Gpt2Config(
        vocab_size=50257, positions=1024, width=width, layers=layers, heads=heads, dropout=0.1, word_dropout=0.0
    )


PRESETS = {
    "gpt2": _preset(768, 12, 12),
    "gpt2-medium": _preset(1024, 24, 16),
    "gpt2-large": _preset(1280, 36, 20),
    "gpt2-xl": _preset(1600, 48, 25),
}


class Reader(NamedTuple):
    """The parameters that are read for every token decoded, made ready for that once: in the dtype of the computation,
    layer by layer."""

    token_embeddings: jax.Array  # V D, and rows of zeros
    layers: Layers


class Gpt2(nn.Module):
    """The language model, split where ClipCap needs it: `embed`, then hidden states, then `logits`."""

    config: Gpt2Config
    dtype: jnp.dtype
    hooks: Hooks = Hooks()

    def setup(self) -> None:
        config = self.config
        # As CLIP's towers, not OpenAI's 0.02 for every width: in a narrow model trained from scratch that shrinks
        # whatever passes through, and it takes far longer to learn to look at its prefix.
        init = nn.initializers.normal(config.width**-0.5)
        self.token_embeddings = self.param("token_embeddings", init, (config.vocab_size, config.width))
        self.position_embeddings = self.param("position_embeddings", init, (config.positions, config.width))
        self.transformer = Transformer(
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_width=4 * config.width,
            activation=jax.nn.gelu,  # the tanh approximation, GPT-2's `gelu_new`
            kernel_init=init,
            residual_init=nn.initializers.normal((2 * config.width * config.layers) ** -0.5),
            dropout=config.dropout,
            dtype=self.dtype,
            hooks=self.hooks,
        )
        self.final_norm = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype)
        self.drop = nn.Dropout(config.dropout)
        self.drop_words = nn.Dropout(config.word_dropout, broadcast_dims=(-1,))

    def embed(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """int ids `B T` to embeddings `B T D`, without positions; unless `deterministic`, with word dropout."""
        words = self.hooks.rows(self.hooks.whole(self.token_embeddings)[tokens])
        if not deterministic:
            # Words that are not hidden stay as they are; Dropout has divided them by this.
            words = self.drop_words(words, deterministic=False) * (1 - self.config.word_dropout)
        return words.astype(self.dtype)

    def __call__(self, embeddings: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Input embeddings `B L D` to final hidden states `B L D`, causally.

        Captions are padded on the right, so the causal mask alone keeps padding from real positions.
        """
        length = embeddings.shape[1]
        positions = self.hooks.whole(self.position_embeddings[None, :length])
        x = self.hooks.rows(embeddings + positions.astype(self.dtype))
        x = self.drop(x, deterministic=deterministic)
        return self.final_norm(self.transformer(x, _causal(length), deterministic=deterministic))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `... D` to float32 logits `... V`, through the tied embedding."""
        table = _padded(self.hooks.whole(self.token_embeddings.astype(self.dtype)))
        return self.hooks.rows(_scores(hidden, table)[..., : self.config.vocab_size])

    def reader(self) -> Reader:
        """For `extend`."""
        return Reader(_padded(self.token_embeddings.astype(self.dtype)), self.transformer.unstacked())

    def prefill(self, embeddings: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
        """Read a prefix into a fresh cache.

        Args:
          embeddings: `B P D`, without positions.
          slots: S, the cache's size; the prefix takes the first P.

        Returns:
          The last position's logits, float32 `B V`, and the cache.
        """
        length = embeddings.shape[1]
        x = embeddings + self.position_embeddings[None, :length].astype(self.dtype)
        x, read = self.transformer.prefill(x, _causal(length))
        free = [(0, slots - length)]
        keys = jnp.pad(read.keys, [(0, 0)] * 4 + free)  # N B H K S
        values = jnp.pad(read.values, [(0, 0)] * 3 + free + [(0, 0)])  # N B H S K
        return self.logits(self.final_norm(x[:, -1])), tuple(map(LayerCache, keys, values))

    def extend(
        self, reader: Reader, tokens: jax.Array, position: jax.Array, slot: jax.Array, mask: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read one more token of each of W hypotheses.

        Args:
          reader: the parameters, from `reader`.
          tokens: int `B W`.
          position: scalar, the position all of them stand at.
          slot: scalar, the first of the W neighbouring cache slots that they are written to.
          mask: boolean `B W S`, the slots each hypothesis sees, its own new one included.
          cache: from `prefill` or the last `extend`.

        Returns:
          float32 logits `B W V`, those of the table's rows of zeros `-inf`, and the cache.
        """
        x = reader.token_embeddings[tokens] + self.position_embeddings[position][None, None].astype(self.dtype)
        x, cache = self.transformer.extend(reader.layers, x, mask[:, None], cache, slot)
        logits = _scores(self.final_norm(x), reader.token_embeddings)
        # Not cut off, which would copy them.
        known = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < self.config.vocab_size
        return jnp.where(known, logits, -jnp.inf), cache


def _causal(length: int) -> jax.Array:
    return jnp.tril(jnp.ones((length, length), bool))[None, None]  # 1 1 L L


def _padded(table: jax.Array) -> jax.Array:
    """With rows of zeros, to a number that GPUs compute fast with: of GPT-2's 50257, a training step takes 1.14 times
    as long."""
    return jnp.pad(table, ((0, -len(table) % 128), (0, 0)))


@jax.custom_vjp
def _scores(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """`... D` and `V D` to float32 `... V`. In the gradient's products, what comes from the loss is of their dtype, as
    everywhere else in the model; JAX would compute them in float32, and take many times as long."""
    return jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32)


def _scores_forward(hidden: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    def rounded(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", hidden, weights).astype(jnp.float32)

    return _scores(hidden, weights), jax.vjp(rounded, hidden, weights)[1]


def _scores_backward(gradients: Any, cotangent: jax.Array) -> Any:
    return gradients(cotangent)


_scores.defvjp(_scores_forward, _scores_backward)
