from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import skip_without
from random_models import clipcap_config, random_embeddings, random_params, random_tokens
from tiny import Source

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.captioning.sampling import Sampling, filtered, sample
from clipcap_jax.config import DecodeConfig
from clipcap_jax.models.clipcap import ClipCap

FILTERS = [
    Sampling(0.7),
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_p=0.6),
    Sampling(1.3, top_k=7, top_p=0.8),
    Sampling(0.5, top_k=1000, top_p=1e-6),
]


def by_hand(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities to draw one token by, in the plainest way."""
    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits)[: sampling.top_k]
    probs = np.exp(logits[order]) / np.exp(logits[order]).sum()
    if sampling.top_p is not None:
        order = order[: np.searchsorted(np.cumsum(probs), sampling.top_p) + 1]
    kept = np.exp(logits[order])
    expected = np.zeros(len(logits))
    expected[order] = kept / kept.sum()
    return expected


@pytest.mark.parametrize("sampling", FILTERS)
def test_filters(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (5, 50)).astype(np.float32)
    found = jax.nn.softmax(filtered(jnp.asarray(logits), sampling))
    np.testing.assert_allclose(found, [by_hand(row, sampling) for row in logits], atol=1e-6)


@pytest.mark.parametrize("sampling", FILTERS)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    skip_without("torch")
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(1).normal(0, 2, (5, 50)).astype(np.float32)
    expected = TemperatureLogitsWarper(float(sampling.temperature))(None, torch.tensor(logits))
    if sampling.top_k is not None:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p is not None:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    np.testing.assert_allclose(filtered(jnp.asarray(logits), sampling), expected.numpy(), rtol=1e-6)


def test_what_is_never_drawn() -> None:
    logits = jnp.asarray([1.0, -jnp.inf, 2.0, -jnp.inf])
    for sampling in (Sampling(2.0), Sampling(1.0, top_k=4), Sampling(1.0, top_p=0.999)):
        assert np.isfinite(filtered(logits, sampling)).tolist() == [True, False, True, False]


MODEL, VOCAB_SIZE, NO_END = ClipCap(clipcap_config(vocab_size=5)), 5, 5


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, top_k=4, top_p=0.9)])
def test_captions_are_drawn_by_their_probability(sampling: Sampling) -> None:
    """Of two tokens, both rows' and draws' numbers; scores are of the model itself."""
    params = random_params(MODEL, 0, random_embeddings(0, 1), random_tokens(0, 1, 2, vocab_size=VOCAB_SIZE))
    params = jax.tree.map(lambda leaf: 0.7 * leaf, params)  # or one token would take it all
    rows, draws = 2000, 4
    embeddings = np.repeat(random_embeddings(0, 1), rows, axis=0)
    decode = DecodeConfig(1, 2, 0.0, "")

    @jax.jit
    def draw(params: Any) -> Any:
        key, numbers = jax.random.key(3), jnp.arange(rows)
        return sample(MODEL, params, jnp.asarray(embeddings), numbers, key, decode, sampling, draws, NO_END)

    found = draw(params)
    pairs = np.array([[a, b] for a in range(VOCAB_SIZE) for b in range(VOCAB_SIZE)], np.int32)
    logits = np.asarray(MODEL.apply({"params": params}, np.repeat(embeddings[:1], len(pairs), axis=0), pairs))
    expected = np.array(
        [
            by_hand(logit[0], sampling)[a] * by_hand(logit[1], sampling)[b]
            for logit, (a, b) in zip(logits, pairs, strict=True)
        ]
    )
    for drawn in (found.tokens.reshape(-1, 2), found.tokens[:, -1]):
        counts = np.bincount(np.asarray(drawn) @ [VOCAB_SIZE, 1], minlength=len(pairs))
        possible = expected > 0
        assert not counts[~possible].any()
        error = np.sqrt(len(drawn) * expected * (1 - expected))
        assert (np.abs(counts - len(drawn) * expected) <= 4.5 * error + 1e-9).all()
    assert (expected > 0.01).sum() > 5
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    scores = log_probs[np.arange(len(pairs)), 0, pairs[:, 0]] + log_probs[np.arange(len(pairs)), 1, pairs[:, 1]]
    np.testing.assert_allclose(found.scores, scores[np.asarray(found.tokens) @ [VOCAB_SIZE, 1]], rtol=1e-4)


@pytest.fixture(scope="module")
def captioner(embeddings_run: Path) -> Captioner:
    return Captioner.load(embeddings_run)


def test_a_seed_draws_the_same_whatever_the_batch(captioner: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)[:10]
    drawn = captioner.caption(embeddings, temperature=3.0, seed=1, n=2)
    for batch_size in (4, 8):
        again = captioner.caption(embeddings, temperature=3.0, seed=1, n=2, batch_size=batch_size)
        assert [[one.text for one in two] for two in again] == [[one.text for one in two] for two in drawn]
    first = captioner.caption(embeddings, temperature=3.0, seed=1)
    assert [one.text for one in first] == [two[0].text for two in drawn]
    texts = [one.text for two in drawn for one in two]
    assert len({*texts}) > 10
    assert texts != [one.text for two in captioner.caption(embeddings, temperature=3.0, seed=2, n=2) for one in two]
    unseeded = [captioner.caption(embeddings, temperature=3.0) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    embeddings[0] = np.nan  # what is broken does not move the others
    found = captioner.caption(embeddings, temperature=3.0, seed=1, errors="return")
    assert [one.text for one in found[1:]] == [one.text for one in first[1:]]


def test_drawing_only_the_likeliest_is_greedy(captioner: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)
    greedy = captioner.caption(embeddings, beam_size=1)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        drawn = captioner.caption(embeddings, **options)
        assert [one.text for one in drawn] == [one.text for one in greedy]
        np.testing.assert_allclose([one.score for one in drawn], [one.score for one in greedy], rtol=1e-4)
