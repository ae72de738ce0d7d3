import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcap_jax.config import Targets
from clipcap_jax.training.loss import caption_loss

jitted = jax.jit(caption_loss, static_argnums=(3, 4))


def loop(logits: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, label_smoothing: float) -> tuple[float, int]:
    """Cross-entropy by its definition, token by token, in float64."""
    total, count, vocab_size = 0.0, 0, logits.shape[2]
    for row, length in enumerate(lengths):
        for position in range(length):
            scores = logits[row, position].astype(np.float64)
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            target = np.full(vocab_size, label_smoothing / vocab_size)
            target[tokens[row, position]] += 1 - label_smoothing
            total -= target @ np.log(probabilities)
            count += 1
    return total, count


def random_batch(
    seed: int, lengths: list[int], longest: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (len(lengths), longest, vocab_size)).astype(np.float32)
    tokens = random.integers(0, vocab_size, (len(lengths), longest), dtype=np.int32)
    return logits, tokens, np.array(lengths, np.int32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_equals_the_definition(label_smoothing: float) -> None:
    batch = random_batch(0, [0, 1, 4, 5], longest=5, vocab_size=7)
    loss, count = jitted(*batch, label_smoothing)
    expected, tokens = loop(*batch, label_smoothing)
    assert loss.dtype == count.dtype == jnp.float32
    assert count == tokens == 10
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@settings(max_examples=15)
@given(st.integers(1, 5), st.data(), st.integers(1, 9), st.floats(0, 0.99), st.integers(0, 2**32 - 1))
def test_equals_the_definition_in_any_shape(
    longest: int, data: st.DataObject, vocab_size: int, label_smoothing: float, seed: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
    batch = random_batch(seed, lengths, longest, vocab_size)
    loss, count = jitted(*batch, label_smoothing)
    expected, tokens = loop(*batch, label_smoothing)
    assert count == tokens
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all", "original"])
def test_gradient_is_softmax_less_target(label_smoothing: float, targets: Targets) -> None:
    logits, tokens, lengths = random_batch(0, [0, 1, 4, 5], longest=5, vocab_size=7)
    tokens[3, 2] = 0  # which the original does not learn
    gradient = jax.grad(lambda logits: 3 * jitted(logits, tokens, lengths, label_smoothing, targets)[0])
    real = np.arange(5) < lengths[:, None]
    if targets == "original":
        real &= tokens != 0
    target = (1 - label_smoothing) * np.eye(7)[tokens] + label_smoothing / 7
    exponents = np.exp(logits.astype(np.float64))
    expected = 3 * (exponents / exponents.sum(axis=-1, keepdims=True) - target) * real[..., None]
    np.testing.assert_allclose(gradient(logits), expected, rtol=1e-5, atol=1e-6)


def test_what_stands_behind_the_length_is_ignored() -> None:
    logits, tokens, lengths = random_batch(0, [0, 2, 5], longest=5, vocab_size=7)
    expected = jitted(logits, tokens, lengths, 0.1)
    behind = np.arange(5) >= lengths[:, None]
    logits[behind], tokens[behind] = np.nan, -1
    assert jitted(logits, tokens, lengths, 0.1) == expected


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    batch = random_batch(0, [5, 0, 1, 3, 2, 5], longest=5, vocab_size=7)
    parts = [jitted(*(array[rows] for array in batch), 0.1) for rows in np.split(np.arange(6), 3)]
    whole = jitted(*batch, 0.1)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)
