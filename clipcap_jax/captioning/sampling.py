"""Captions that are drawn, rather than searched for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipcap_jax.captioning.constraints import FREE, Constraints, constrained
from clipcap_jax.captioning.decode import Hypotheses, Search, decode
from clipcap_jax.config import DecodeConfig
from clipcap_jax.models.clipcap import ClipCap


class Sampling(NamedTuple):
    """How tokens are drawn: numbers, which may be traced, or None for no such filter.

    temperature: logits are divided by it; below 1 likely tokens become likelier.
    top_k: of the tokens, only so many are drawn, the likeliest.
    top_p: only the likeliest are drawn whose probabilities together reach this, or the likeliest one.
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits `... V` to draw from: divided by the temperature, and `-inf` where `top_k`, then `top_p`, leave out.

    As transformers' warpers, in their order; but tokens that are as likely as the last one kept are all kept.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kept = jnp.ones(ordered.shape, bool)
    if sampling.top_k is not None:
        last = jnp.clip(sampling.top_k, 1, logits.shape[-1]) - 1
        kept = ordered >= jax.lax.dynamic_index_in_dim(ordered, last, axis=-1)
    if sampling.top_p is not None:
        probs = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        likelier = jnp.cumsum(probs, axis=-1) - probs  # of the tokens before
        kept &= (likelier < sampling.top_p).at[..., 0].set(True)
    threshold = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    model: ClipCap,
    params: Any,
    inputs: jax.Array,
    rows: jax.Array,
    key: jax.Array,
    config: DecodeConfig,
    sampling: Sampling,
    draws: int,
    end_token: int,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """Draw captions for a batch.

    A caption depends on the key, its row's number and which draw it is, not on what else is in the batch.

    Args:
      model, params: a ClipCap and its parameters.
      inputs: uint8 images `B H W 3` or embeddings `B E`.
      rows: uint32 `B`, the rows' numbers.
      key: a PRNG key.
      config: length limit and how scores are made; its beam is not used.
      sampling: how tokens are drawn.
      draws: W, captions of each image.
      end_token: the id that finishes a caption.
      constraints: what captions are held to.

    Returns:
      In the order in which they were drawn. Scores are the model's own, as greedy decoding has them, without
      temperature, filters and penalty; `-inf` where no token was allowed.

    Raises:
      UserError: captions may be longer than GPT-2 can read.
    """
    each = jnp.arange(draws)
    keys = jax.vmap(lambda row: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, row), i))(each))(rows)

    def draw(logits: jax.Array, written: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        """Of logits `B W V` after `written`, `B W T` or `1 1 T`: log-probabilities and tokens, `B W`."""
        allowed = constrained(logits, written, step, end_token, constraints)

        def one(key: jax.Array, logits: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(key, step), filtered(logits, sampling))

        tokens = jax.vmap(jax.vmap(one))(keys, allowed)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        if constraints.change_scores:  # which may have left no token
            log_probs = jnp.where((allowed > -jnp.inf).any(axis=-1), log_probs, -jnp.inf)
        return log_probs, tokens

    def first(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return draw(jnp.repeat(logits[:, None], draws, axis=1), jnp.zeros((1, 1, config.max_tokens), jnp.int32), 0)

    def choose(search: Search, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_probs, tokens = draw(logits, search.tokens, search.step)
        parents = jnp.broadcast_to(each, tokens.shape)
        return (
            parents,
            jnp.where(search.finished, end_token, tokens),
            search.log_probs + jnp.where(search.finished, 0.0, log_probs),
        )

    return decode(model, params, inputs, config, end_token, draws, first, choose, constraints.prompt)
