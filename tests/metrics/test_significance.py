import dataclasses
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from clipcap_jax.metrics import References, Scores
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.significance import Interval, differences, intervals


def scores_of(values: np.ndarray, name: str = "X") -> Scores:
    return Scores(tuple(map(str, range(len(values)))), {name: mean(values)}, {})


def test_an_interval_leaves_out_as_much_on_either_side() -> None:
    values = np.random.default_rng(0).permutation(1001)
    for level, expected in {0.95: (25, 975), 0.8: (100, 900)}.items():
        found = Interval.of(values, level, 10**6)
        assert (found.low, found.high) == pytest.approx(expected, abs=0.01)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = intervals(scores_of(values), draws=20_000)["X"]
    error = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - error, abs=0.04 * error)  # 4 standard deviations
    assert found.high == pytest.approx(values.mean() + error, abs=0.04 * error)


def test_the_interval_of_a_score_of_sums() -> None:
    """Against a bootstrap that scores every draw from its captions anew."""
    references = {str(i): [f"a {word} dog runs here", "a cat"] for i, word in enumerate("bcdefghijk")}
    captions = {str(i): "a b dog runs there" if i % 3 else "a cat" for i in range(10)}
    found = intervals(References(references).score(captions), draws=20_000, level=0.8, seed=5)["Bleu_2"]
    rng, drawn = np.random.default_rng(6), []
    for _ in range(800):
        images = rng.integers(0, 10, 10).astype(str)
        again = References({f"{n}": references[i] for n, i in enumerate(images)})
        drawn.append(again.score({f"{n}": captions[i] for n, i in enumerate(images)}).overall["Bleu_2"])
    # Of 10 images the percentiles are taken further out: Student's 1.383 in place of 1.282, times the root of 10/9.
    tail = NormalDist().cdf(-1.383 * math.sqrt(10 / 9))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found.low < np.median(drawn) < found.high


@pytest.mark.parametrize(("images", "student"), [(10, 2.262), (20, 2.093), (100, 1.984)])
def test_the_interval_is_wider_of_few_images(images: int, student: float) -> None:
    """By the quantiles of Student's distribution, from a table."""
    tail = NormalDist().cdf(-student * math.sqrt(images / (images - 1)))
    found = Interval.of(np.arange(100_001.0), 0.95, images)
    assert (found.low, found.high) == pytest.approx((100_000 * tail, 100_000 * (1 - tail)), abs=100_000 * 0.0015)


def test_the_interval_of_one_image_is_its_score() -> None:
    found = intervals(scores_of(np.array([0.5])))["X"]
    assert (found.low, found.high) == (0.5, 0.5)


def test_how_often_the_interval_holds_the_truth() -> None:
    """At 95% and of 8 images, in 93.3% of 3,000 sets; percentiles that are not taken further out, in 88.3%."""
    rng, held = np.random.default_rng(8), 0
    for i in range(400):
        found = intervals(scores_of(rng.normal(2, 1, 8)), draws=400, seed=i)["X"]
        held += found.low <= 2 <= found.high
    assert held / 400 > 0.91


def test_the_same_seed_gives_the_same() -> None:
    scores = scores_of(np.arange(50.0))
    assert intervals(scores) == intervals(scores)
    assert intervals(scores) != intervals(scores, seed=1)


def test_p_is_that_of_all_swaps() -> None:
    """Randomisation comes near the exact test, which tries every way of changing sides."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(0, 1, 10), rng.normal(0.6, 1, 10)
    found = differences(scores_of(first), scores_of(second), draws=50_000)["X"]
    change = second - first
    assert found.value == pytest.approx(change.mean())
    every = np.abs([np.mean(change * signs) for signs in itertools.product((1, -1), repeat=10)])
    exact = np.mean(every >= abs(change.mean()) - 1e-12)
    assert 0.02 < exact < 0.9  # or this would show nothing
    assert found.p == pytest.approx(exact, abs=0.01)  # 4 standard deviations
    assert found.interval.low < found.value < found.interval.high


def test_either_side_is_as_likely() -> None:
    """Of four images with the same gain, 2 of the 16 ways of changing sides are as far apart: all, or none."""
    found = differences(scores_of(np.zeros(4)), scores_of(np.ones(4)), draws=20_000)["X"]
    assert found.p == pytest.approx(2 / 16, abs=0.01)  # 4 standard deviations


def test_equal_captioners_do_not_differ() -> None:
    scores = scores_of(np.random.default_rng(3).random(30))
    found = differences(scores, scores)["X"]
    assert (found.value, found.interval.low, found.interval.high, found.p) == (0, 0, 0, 1)


def test_a_clear_difference_is_found() -> None:
    values = np.random.default_rng(4).random(100)
    found = differences(scores_of(values), scores_of(values + 0.1), draws=999)["X"]
    assert found.p == 1 / 1000
    assert found.interval.low > 0.09


def test_only_what_both_have_is_compared() -> None:
    first, second = scores_of(np.arange(3.0)).add({"Y": mean([0, 0, 0])}), scores_of(np.arange(3.0))
    assert list(differences(first, second)) == ["X"]


def test_other_images() -> None:
    first = scores_of(np.arange(3.0))
    with pytest.raises(ValueError, match="other images"):
        differences(first, dataclasses.replace(first, images=("0", "2", "1")))
