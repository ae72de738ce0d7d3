"""Decoding of whole batches with static shapes: beam search, and greedy decoding as its beam of one.

The prefix is read once per image and shared by its beams. Keys and values of generated tokens are written to the cache
once and never moved: token t of beam w lies in slot `P + t * W + w` for good, and a table of each hypothesis' ancestors
is permuted instead and becomes the attention mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipcap_jax.captioning.constraints import FREE, Constraints, constrained
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


class Search(NamedTuple):
    """How far a decoding is."""

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


def _highest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The highest scores of each row, float32 `R W`, highest first, and their tokens; of equals, the first.

    They are among the groups of the vocabulary with the highest maxima, which are found in one pass and are short:
    `top_k` of the whole vocabulary takes longer than the product that made the logits.
    """
    padding = ((0, 0), (0, -scores.shape[-1] % _GROUP))
    groups = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(len(scores), -1, _GROUP)  # R G V/G
    _, best = jax.lax.top_k(groups.max(axis=-1), min(count, groups.shape[1]))
    best = jnp.sort(best)  # of equals in two groups, the first
    found, index = jax.lax.top_k(_take(groups, best).reshape(len(scores), -1), count)  # R W
    tokens = jnp.take_along_axis(best, index // _GROUP, axis=1) * _GROUP + index % _GROUP
    return found, tokens


def _likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The highest log-probabilities of each row, float32 `R W`, and their tokens; of equals, the first."""
    found, tokens = _highest(logits, count)
    highest = found.max(axis=-1, keepdims=True)  # that of the logits would be another pass over them
    return found - highest - jnp.log(jnp.exp(logits - highest).sum(axis=-1, keepdims=True)), tokens


def _rank(log_probs: jax.Array, lengths: jax.Array, config: DecodeConfig) -> jax.Array:
    return log_probs / lengths**config.length_penalty


def beam_search(
    model: ClipCap,
    params: Any,
    inputs: jax.Array,
    config: DecodeConfig,
    end_token: int,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """Search captions for a batch (original `predict.py`, `generate_beam`, on all images at once).

    Every step keeps the W best of all continuations of an image's hypotheses, finished ones included, and stops when
    all hypotheses of all images are finished.

    Args:
      model, params: a ClipCap and its parameters.
      inputs: uint8 images `B H W 3` or embeddings `B E`.
      config: beam size, length limit and ranking.
      end_token: the id that finishes a hypothesis.
      constraints: what captions are held to.

    Returns:
      What is written after the prompt. A hypothesis whose score is not finite breaks the constraints, for want of one
      that does not.

    Raises:
      UserError: the beam is larger than the vocabulary, or captions may be longer than GPT-2 can read.
    """
    beam_size = config.beam_size
    if beam_size > model.config.gpt2.vocab_size:
        raise UserError(
            f"the beam size is {beam_size}, but the vocabulary has only {model.config.gpt2.vocab_size} pieces"
        )
    # A finished hypothesis has one continuation: itself, with nothing added.
    only_itself = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf)[None, None, :]  # 1 1 W

    def likeliest(logits: jax.Array, written: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        """Of logits `... V` after `written`, `... T`: log-probabilities and tokens, `R W`, that the constraints leave.

        Of a beam, log-probabilities are penalised, and those are ranked. Of one hypothesis it is the logits, and its
        score stays the model's own. Both as in transformers: a penalty means here what it means there.
        """
        logits = logits.reshape(-1, logits.shape[-1])
        if not constraints.change_scores:
            return _likeliest(logits, beam_size)
        log_probs = jax.nn.log_softmax(logits)
        scores = log_probs if beam_size > 1 else logits
        scores = constrained(scores, written.reshape(-1, written.shape[-1]), step, end_token, constraints)
        found, tokens = _highest(scores, beam_size)
        if beam_size == 1:
            found = jnp.where(found == -jnp.inf, found, jnp.take_along_axis(log_probs, tokens, axis=-1))
        return found, tokens

    def first(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return likeliest(logits, jnp.zeros((1, config.max_tokens), jnp.int32), 0)

    def choose(search: Search, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The W best of all W * V continuations are among the W best of each hypothesis.
        batch = len(logits)
        top_log_probs, top_tokens = (
            x.reshape(batch, beam_size, -1) for x in likeliest(logits, search.tokens, search.step)
        )  # B W W
        finished = search.finished[..., None]
        totals = search.log_probs[..., None] + jnp.where(finished, only_itself, top_log_probs)
        top_tokens = jnp.where(finished, end_token, top_tokens)
        lengths = search.lengths + ~search.finished  # B W
        _, best = jax.lax.top_k(_rank(totals, lengths[..., None], config).reshape(batch, -1), beam_size)  # B W
        tokens, log_probs = (
            jnp.take_along_axis(x.reshape(batch, -1), best, axis=1) for x in (top_tokens, totals)
        )  # B W
        return best // beam_size, tokens, log_probs

    return decode(model, params, inputs, config, end_token, beam_size, first, choose, constraints.prompt)


def decode(
    model: ClipCap,
    params: Any,
    inputs: jax.Array,
    config: DecodeConfig,
    end_token: int,
    width: int,
    first: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    choose: Callable[[Search, jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    prompt: jax.Array | None = None,
) -> Hypotheses:
    """Write captions for a batch, token by token, until all of them are finished.

    Args:
      model, params, inputs, end_token: as of `beam_search`.
      config: length limit, and how scores are made of log-probabilities.
      width: W, hypotheses of each image.
      first: from float32 logits `B V`, the log-probabilities and first tokens, `B W`.
      choose: from float32 logits `B W V` of what may follow, for each of the next hypotheses, `B W`: the one that it
        goes on with, its token, and its log-probability as a whole.
      prompt: int32 `Q`, tokens that stand between the prefix and what is written; None: none.

    Raises:
      UserError: captions may be longer than GPT-2 can read.
    """
    max_tokens, prefix_length = config.max_tokens, model.config.mapper.prefix_length
    if prompt is not None:
        prefix_length += len(prompt)
    if prefix_length + max_tokens > model.config.gpt2.positions:
        raise UserError(
            f"prefix{', prompt' * (prompt is not None)} and caption take up to {prefix_length + max_tokens} positions, "
            f"but GPT-2 has {model.config.gpt2.positions}: a lower max_tokens is needed"
        )
    variables = {"params": params}

    # The last token is never fed back, so it needs no slot; but the loop is traced even where it takes no step.
    fed_tokens = max(max_tokens - 1, 1)
    slots = prefix_length + fed_tokens * width
    reader = model.apply(variables, method="reader")
    logits, cache = model.apply(variables, inputs, slots, prompt, method="prefill")
    log_probs, tokens = first(logits)  # B W
    batch = tokens.shape[0]
    search = Search(
        step=jnp.int32(1),
        tokens=jnp.full((batch, width, max_tokens), end_token, jnp.int32).at[:, :, 0].set(tokens),
        log_probs=log_probs,
        lengths=jnp.ones((batch, width), jnp.int32),
        finished=tokens == end_token,
        ancestors=jnp.zeros((batch, width, fed_tokens), jnp.int32),
        cache=cache,
    )
    own_beam = jnp.broadcast_to(jnp.arange(width)[None, :, None], (batch, width, 1))
    all_beams = jnp.arange(width)[None, None, None, :]

    def unfinished(search: Search) -> jax.Array:
        return (search.step < max_tokens) & ~search.finished.all()

    def advance(search: Search) -> Search:
        fed = search.step - 1
        ancestors = jax.lax.dynamic_update_slice(search.ancestors, own_beam, (0, 0, fed))
        written = jnp.arange(fed_tokens) <= fed
        seen = (ancestors[..., None] == all_beams) & written[None, None, :, None]  # B W T-1 W
        mask = jnp.concatenate(
            [jnp.ones((batch, width, prefix_length), bool), seen.reshape(batch, width, -1)], axis=-1
        )  # B W S
        logits, cache = model.apply(
            variables,
            reader,
            jax.lax.dynamic_index_in_dim(search.tokens, fed, axis=2, keepdims=False),
            prefix_length + fed,
            prefix_length + fed * width,
            mask,
            search.cache,
            method="extend",
        )  # B W V
        parents, tokens, log_probs = choose(search, logits)  # B W
        history = _take(search.tokens, parents)
        return Search(
            step=search.step + 1,
            tokens=jax.lax.dynamic_update_slice(history, tokens[..., None], (0, 0, search.step)),
            log_probs=log_probs,
            lengths=_take(search.lengths + ~search.finished, parents),
            finished=_take(search.finished, parents) | (tokens == end_token),
            ancestors=_take(ancestors, parents),
            cache=cache,
        )

    search = jax.lax.while_loop(unfinished, advance, search)
    return Hypotheses(search.tokens, search.lengths, _rank(search.log_probs, search.lengths, config), search.finished)
