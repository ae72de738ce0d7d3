"""What captions are held to, however they are made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ANY = -1  # in a banned sequence: any token, or none


class Constraints(NamedTuple):
    """Arrays and numbers, which may be traced, or None for no such constraint.

    prompt: int32 `Q`, the tokens that a caption goes on from.
    min_tokens: the end token is not among so many first ones after the prompt.
    repetition_penalty: log-probabilities or logits of tokens that the caption has already, the prompt's included, are
      multiplied by it where they are negative, and divided where they are not (CTRL, arXiv 1909.05858, section 4.1, as
      transformers has it).
    banned: int32 `N L`, sequences of tokens that do not occur, also such that begin in the prompt; shorter ones are
      filled up on the left with `ANY`.
    """

    prompt: Any = None
    min_tokens: Any = None
    repetition_penalty: Any = None
    banned: Any = None

    @property
    def change_scores(self) -> bool:
        """Whether `constrained` has anything to do."""
        return self[1:] != (None,) * 3


FREE = Constraints()


def constrained(scores: jax.Array, tokens: jax.Array, step: Any, end_token: int, constraints: Constraints) -> jax.Array:
    """The scores of the next tokens, `-inf` of those that must not follow.

    As transformers' `RepetitionPenaltyLogitsProcessor`, `NoBadWordsLogitsProcessor` and
    `MinNewTokensLengthLogitsProcessor`, in their order.

    Args:
      scores: float32 `... V`, logits or log-probabilities.
      tokens: int32 `... T`, what is written after the prompt.
      step: how many of them are written; the others do not count.
      end_token: the id that ends a caption.
      constraints: which.
    """
    if not constraints.change_scores:
        return scores
    prompt, min_tokens, penalty, banned = constraints
    prompt = jnp.zeros(0, jnp.int32) if prompt is None else jnp.asarray(prompt)

    def of_one(scores: jax.Array, tokens: jax.Array) -> jax.Array:  # V, T
        if penalty is not None:
            none = len(scores)  # an id that no token has
            seen = jnp.concatenate([prompt, jnp.where(jnp.arange(len(tokens)) < step, tokens, none)])  # Q+T
            found = scores.at[seen].get(mode="fill", fill_value=0)
            scores = scores.at[seen].set(jnp.where(found < 0, found * penalty, found / penalty), mode="drop")
        if banned is not None:
            before = banned.shape[1] - 1
            text = jnp.concatenate([jnp.full(before, ANY - 1), prompt, tokens])
            last = jax.lax.dynamic_slice(text, (len(prompt) + step,), (before,))
            begun = ((last[None] == banned[:, :-1]) | (banned[:, :-1] == ANY)).all(axis=1)  # N
            scores = scores.at[banned[:, -1]].min(jnp.where(begun, -jnp.inf, jnp.inf))
        if min_tokens is not None:
            scores = scores.at[end_token].min(jnp.where(step < min_tokens, -jnp.inf, jnp.inf))
        return scores

    return jnp.vectorize(of_one, signature="(v),(t)->(v)")(scores, tokens)
