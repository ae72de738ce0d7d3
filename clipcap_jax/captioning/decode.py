"""Beam search, and greedy decoding as its beam of one, for whole batches with static shapes.

The prefix is read once per image and shared by its beams. Keys and values of generated tokens are written to the cache
once and never moved: token t of beam w lies in slot `P + t * W + w` for good, and a table of each hypothesis' ancestors
is permuted instead and becomes the attention mask.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.models.gpt2 import Cache


class Hypotheses(NamedTuple):
    """What the search found, best first.

    tokens: int32 `B W T`, filled up with the end token; lengths: int32 `B W`, the end token included;
    scores: float32 `B W`, the ranked quantity; finished: bool `B W`, false where `max_tokens` cut the caption.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array


class _Search(NamedTuple):
    step: jax.Array  # tokens generated so far
    tokens: jax.Array  # B W T
    log_probs: jax.Array  # B W, summed over the tokens
    lengths: jax.Array  # B W
    finished: jax.Array  # B W
    ancestors: jax.Array  # B W T: which beam held this hypothesis' token t when it was fed
    cache: Cache


_GROUP = 128  # tokens


def _take(array: jax.Array, beams: jax.Array) -> jax.Array:
    """Reorder axis 1 of `array`, `B W ...`, by `beams`, `B W`."""
    return jax.vmap(lambda row, index: row[index])(array, beams)


def _likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The highest log-probabilities of each row, float32 `R W`, and their tokens; of equals, the first.

    They are among the groups of the vocabulary with the highest maxima, which are found in one pass and are short:
    `top_k` of the whole vocabulary takes longer than the product that made the logits.
    """
    padding = ((0, 0), (0, -logits.shape[-1] % _GROUP))
    groups = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(len(logits), -1, _GROUP)  # R G V/G
    maxima = groups.max(axis=-1)
    _, best = jax.lax.top_k(maxima, min(count, groups.shape[1]))
    best = jnp.sort(best)  # of equals in two groups, the first
    found, index = jax.lax.top_k(_take(groups, best).reshape(len(logits), -1), count)  # R W
    tokens = jnp.take_along_axis(best, index // _GROUP, axis=1) * _GROUP + index % _GROUP
    highest = maxima.max(axis=-1, keepdims=True)
    return found - highest - jnp.log(jnp.exp(logits - highest).sum(axis=-1, keepdims=True)), tokens


def beam_search(model: ClipCap, params: Any, inputs: jax.Array, config: DecodeConfig, end_token: int) -> Hypotheses:
    """Search captions for a batch (original `predict.py`, `generate_beam`, on all images at once).

    Every step keeps the W best of all continuations of an image's hypotheses, finished ones included, and stops when
    all hypotheses of all images are finished.

    Args:
      model, params: a ClipCap and its parameters.
      inputs: uint8 images `B H W 3` or embeddings `B E`.
      config: beam size, length limit and ranking.
      end_token: the id that finishes a hypothesis.

    Raises:
      UserError: the beam is larger than the vocabulary, or captions may be longer than GPT-2 can read.
    """
    beam_size, max_tokens = config.beam_size, config.max_tokens
    prefix_length = model.config.mapper.prefix_length
    if beam_size > model.config.gpt2.vocab_size:
        raise UserError(
            f"the beam size is {beam_size}, but the vocabulary has only {model.config.gpt2.vocab_size} pieces"
        )
    if prefix_length + max_tokens > model.config.gpt2.positions:
        raise UserError(
            f"prefix and caption take up to {prefix_length + max_tokens} positions, but GPT-2 has "
            f"{model.config.gpt2.positions}: a lower max_tokens is needed"
        )
    variables = {"params": params}

    # The last token is never fed back, so it needs no slot; but the loop is traced even where it takes no step.
    fed_tokens = max(max_tokens - 1, 1)
    slots = prefix_length + fed_tokens * beam_size
    reader = model.apply(variables, method="reader")
    logits, cache = model.apply(variables, inputs, slots, method="prefill")
    log_probs, tokens = _likeliest(logits, beam_size)  # B W
    batch = tokens.shape[0]
    search = _Search(
        step=jnp.int32(1),
        tokens=jnp.full((batch, beam_size, max_tokens), end_token, jnp.int32).at[:, :, 0].set(tokens),
        log_probs=log_probs,
        lengths=jnp.ones((batch, beam_size), jnp.int32),
        finished=tokens == end_token,
        ancestors=jnp.zeros((batch, beam_size, fed_tokens), jnp.int32),
        cache=cache,
    )
    own_beam = jnp.broadcast_to(jnp.arange(beam_size)[None, :, None], (batch, beam_size, 1))
    all_beams = jnp.arange(beam_size)[None, None, None, :]
    # A finished hypothesis has one continuation: itself, with nothing added.
    only_itself = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf)[None, None, :]  # 1 1 W

    def rank(log_probs: jax.Array, lengths: jax.Array) -> jax.Array:
        return log_probs / lengths**config.length_penalty

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < max_tokens) & ~search.finished.all()

    def advance(search: _Search) -> _Search:
        fed = search.step - 1
        ancestors = jax.lax.dynamic_update_slice(search.ancestors, own_beam, (0, 0, fed))
        written = jnp.arange(fed_tokens) <= fed
        seen = (ancestors[..., None] == all_beams) & written[None, None, :, None]  # B W T-1 W
        mask = jnp.concatenate(
            [jnp.ones((batch, beam_size, prefix_length), bool), seen.reshape(batch, beam_size, -1)], axis=-1
        )  # B W S
        logits, cache = model.apply(
            variables,
            reader,
            jax.lax.dynamic_index_in_dim(search.tokens, fed, axis=2, keepdims=False),
            prefix_length + fed,
            prefix_length + fed * beam_size,
            mask,
            search.cache,
            method="extend",
        )  # B W V

        # The W best of all W * V continuations are among the W best of each hypothesis.
        top_log_probs, top_tokens = (
            x.reshape(batch, beam_size, -1) for x in _likeliest(logits.reshape(batch * beam_size, -1), beam_size)
        )  # B W W
        finished = search.finished[..., None]
        totals = search.log_probs[..., None] + jnp.where(finished, only_itself, top_log_probs)
        top_tokens = jnp.where(finished, end_token, top_tokens)
        lengths = search.lengths + ~search.finished  # B W
        _, best = jax.lax.top_k(rank(totals, lengths[..., None]).reshape(batch, -1), beam_size)  # B W
        parents = best // beam_size
        tokens = jnp.take_along_axis(top_tokens.reshape(batch, -1), best, axis=1)  # B W
        history = _take(search.tokens, parents)
        return _Search(
            step=search.step + 1,
            tokens=jax.lax.dynamic_update_slice(history, tokens[..., None], (0, 0, search.step)),
            log_probs=jnp.take_along_axis(totals.reshape(batch, -1), best, axis=1),
            lengths=_take(lengths, parents),
            finished=_take(search.finished, parents) | (tokens == end_token),
            ancestors=_take(ancestors, parents),
            cache=cache,
        )

    search = jax.lax.while_loop(unfinished, advance, search)
    return Hypotheses(search.tokens, search.lengths, rank(search.log_probs, search.lengths), search.finished)
