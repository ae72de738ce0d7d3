import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import clipcap_config, random_embeddings, random_params, random_tokens

from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.models.gpt2 import Cache, Reader

VOCAB_SIZE, BATCH, MAX_TOKENS = 11, 4, 6
NO_END = VOCAB_SIZE  # an id that no token has
MODEL = ClipCap(clipcap_config(vocab_size=VOCAB_SIZE))
EMBEDDINGS = random_embeddings(0, BATCH)

NextLogProbs = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, 0, EMBEDDINGS, random_tokens(0, BATCH, MAX_TOKENS))


@functools.cache
def search(beam_size: int, max_tokens: int = MAX_TOKENS) -> Callable[..., Hypotheses]:
    """The search under test; what may vary without a new compilation are its arguments."""

    @jax.jit
    def search(params: Any, embeddings: jax.Array, length_penalty: Any, end_token: Any) -> Hypotheses:
        return beam_search(
            MODEL, params, embeddings, DecodeConfig(beam_size, max_tokens, length_penalty, ""), end_token
        )

    return lambda *args: jax.device_get(search(*args))


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]
    log_prob: float
    finished: bool


def reference(
    next_log_probs: NextLogProbs, beam_size: int, max_tokens: int, length_penalty: float, end_token: int
) -> list[tuple[Hypothesis, float]]:
    """Beam search as the original does it, on one image and in the plainest way: hypotheses with their scores."""

    def score(hypothesis: Hypothesis) -> float:
        return hypothesis.log_prob / len(hypothesis.tokens) ** length_penalty

    beam = [Hypothesis((), 0.0, False)]
    for _ in range(max_tokens):
        if all(hypothesis.finished for hypothesis in beam):
            break
        candidates = []
        for hypothesis, row in zip(beam, next_log_probs([tokens for tokens, _, _ in beam]), strict=True):
            if hypothesis.finished:
                candidates.append(hypothesis)
            else:
                tokens, log_prob, _ = hypothesis
                candidates += [Hypothesis((*tokens, t), log_prob + p, t == end_token) for t, p in enumerate(row)]
        beam = sorted(candidates, key=score, reverse=True)[:beam_size]
    return [(hypothesis, score(hypothesis)) for hypothesis in beam]


@functools.partial(jax.jit, static_argnums=0)
def _logits(rows: int, params: Any, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    return MODEL.apply({"params": params}, jnp.repeat(embedding, rows, axis=0), tokens)


def uncached(params: Any, embedding: np.ndarray, rows: int) -> NextLogProbs:
    """Log-probabilities, in float64, of what may follow up to `rows` hypotheses, all read anew from the start."""

    def next_log_probs(hypotheses: Sequence[tuple[int, ...]]) -> np.ndarray:
        tokens = np.zeros((rows, MAX_TOKENS), np.int32)
        for row, hypothesis in zip(tokens, hypotheses, strict=False):
            row[: len(hypothesis)] = hypothesis
        logits = np.asarray(_logits(rows, params, embedding[None], tokens), np.float64)
        positions = [min(len(hypothesis), MAX_TOKENS - 1) for hypothesis in hypotheses]
        logits = logits[np.arange(len(hypotheses)), positions]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    return next_log_probs


def assert_equal(found: Hypotheses, image: int, expected: list[tuple[Hypothesis, float]], end_token: int) -> None:
    lengths = found.lengths[image].tolist()
    captions = [tuple(row[:length].tolist()) for row, length in zip(found.tokens[image], lengths, strict=True)]
    assert captions == [hypothesis.tokens for hypothesis, _ in expected]
    assert found.finished[image].tolist() == [hypothesis.finished for hypothesis, _ in expected]
    np.testing.assert_allclose(found.scores[image], [score for _, score in expected], atol=1e-5)
    for row, length in zip(found.tokens[image], lengths, strict=True):
        assert (row[length:] == end_token).all()


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_equals_the_plain_search(params: Any, beam_size: int) -> None:
    """With each token once as the end, so that captions end at every length, or not at all. The plain search sees one
    image at a time: a batch changes nothing."""
    lengths_seen = set()
    for end_token, length_penalty in zip(range(VOCAB_SIZE), itertools.cycle((1.0, 0.0, 1.7)), strict=False):
        found = search(beam_size)(params, EMBEDDINGS, length_penalty, end_token)
        for image, embedding in enumerate(EMBEDDINGS):
            next_log_probs = uncached(params, embedding, beam_size)
            expected = reference(next_log_probs, beam_size, MAX_TOKENS, length_penalty, end_token)
            assert_equal(found, image, expected, end_token)
        lengths_seen |= {*zip(found.lengths.ravel().tolist(), found.finished.ravel().tolist(), strict=True)}
    assert lengths_seen >= {(1, True), (2, True), (3, True), (MAX_TOKENS, False)}


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0, 2), st.integers(0, VOCAB_SIZE - 1))
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_captions_of_two_tokens(
    params: Any, seed: int, length_penalty: float, end_token: int
) -> None:
    embeddings = random_embeddings(seed, 1)
    next_log_probs = uncached(params, embeddings[0], VOCAB_SIZE)
    first, second = next_log_probs([()])[0], next_log_probs([(token,) for token in range(VOCAB_SIZE)])
    scores: dict[tuple[int, ...], float] = {
        (a, b): (first[a] + second[a, b]) / 2**length_penalty for a, b in np.ndindex(second.shape) if a != end_token
    }
    scores[end_token,] = first[end_token]
    best = sorted(scores, key=lambda caption: -scores[caption])[:VOCAB_SIZE]

    found = search(VOCAB_SIZE, max_tokens=2)(params, embeddings, length_penalty, end_token)
    np.testing.assert_allclose(found.scores[0], [scores[caption] for caption in best], atol=1e-5)
    captions = [tuple(row[:length]) for row, length in zip(found.tokens[0].tolist(), found.lengths[0], strict=True)]
    # Equal up to the order of captions whose scores are the same in float32.
    np.testing.assert_allclose([scores[caption] for caption in captions], found.scores[0], atol=1e-5)
    assert len(set(captions)) == VOCAB_SIZE


def test_greedy_takes_the_likeliest_token(params: Any) -> None:
    tokens = np.zeros((BATCH, MAX_TOKENS), np.int32)
    for image, embedding in enumerate(EMBEDDINGS):
        next_log_probs = uncached(params, embedding, 1)
        for step in range(MAX_TOKENS):
            tokens[image, step] = next_log_probs([tuple(tokens[image, :step])])[0].argmax()

    found = search(1)(params, EMBEDDINGS, 1.0, NO_END)
    np.testing.assert_array_equal(found.tokens[:, 0], tokens)
    assert (found.lengths == MAX_TOKENS).all()
    assert not found.finished.any()

    end_token = tokens[1, 2]
    found = search(1)(params, EMBEDDINGS, 1.0, end_token)
    for image, row in enumerate(tokens.tolist()):
        length = row.index(end_token) + 1 if end_token in row else MAX_TOKENS
        assert found.finished[image, 0] == (end_token in row)
        assert found.tokens[image, 0].tolist() == row[:length] + [end_token] * (MAX_TOKENS - length)


def test_captions_of_one_token(params: Any) -> None:
    found = search(2, max_tokens=1)(params, EMBEDDINGS, 1.0, 8)
    for image, embedding in enumerate(EMBEDDINGS):
        assert_equal(found, image, reference(uncached(params, embedding, 2), 2, 1, 1.0, 8), 8)
    assert 0 < found.finished.sum() < found.finished.size


class Counting(ClipCap):
    """Notes every token that is read."""

    def extend(self, reader: Reader, tokens: jax.Array, position: jax.Array, *others: Any) -> tuple[jax.Array, Cache]:
        jax.debug.callback(_read.append, position)
        return super().extend(reader, tokens, position, *others)


_read: list[Any] = []


def test_the_search_stops_when_all_captions_are_finished(params: Any) -> None:
    model, embedding, config = Counting(MODEL.config), jnp.asarray(EMBEDDINGS[:1]), DecodeConfig(1, MAX_TOKENS, 1.0, "")
    decode = jax.jit(lambda end: beam_search(model, params, embedding, config, end))
    caption = decode(NO_END).tokens[0, 0].tolist()
    for end_token in caption:
        jax.effects_barrier()
        _read.clear()
        length = int(decode(end_token).lengths[0, 0])
        jax.effects_barrier()
        assert length == caption.index(end_token) + 1
        prefix_length = MODEL.config.mapper.prefix_length
        assert sorted(map(int, _read)) == list(range(prefix_length, prefix_length + length - 1))


def test_a_beam_wider_than_the_vocabulary(params: Any) -> None:
    with pytest.raises(UserError, match=r"beam size is 12, .* 11 pieces"):
        search(VOCAB_SIZE + 1)(params, EMBEDDINGS, 1.0, 0)
