"""How far a score is chance: confidence intervals, and tests of the difference between two captioners.

Both draw images again, as if other pictures of the same kind had been captioned. What depends on the whole set stays as
it is: CIDEr's weights, which come from all references.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from clipcap_jax.metrics.measure import Measure
from clipcap_jax.metrics.references import Scores

_AT_ONCE = 100  # draws, each of as many numbers as there are images


@dataclasses.dataclass(frozen=True)
class Interval:
    """From where to where."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better the second is than the first.

    Attributes:
      value: the second's score less the first's.
      interval: of the difference.
      p: how often chance alone gives a difference as large, if the two are equally good.
    """

    value: float
    interval: Interval
    p: float


def intervals(scores: Scores, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """Percentile bootstrap (Efron 1979): each draw takes as many images as there are, with replacement.

    Args:
      scores: of one captioner.
      draws: the more, the less the interval itself depends on chance.
      level: the share of draws that it holds.
      seed: the same one gives the same intervals.

    Returns:
      An interval for each score.
    """
    weights = _bootstrap(len(scores.images), draws, np.random.default_rng(seed))
    drawn = _rescore(weights, scores.measures.values())
    return {name: _interval(values, level) for name, values in zip(scores.measures, drawn.T, strict=True)}


def differences(
    first: Scores, second: Scores, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """What the second captioner gains over the first, on the same images.

    The interval is a paired bootstrap (Koehn, EMNLP 2004): both are scored on the images of a draw. `p` is approximate
    randomisation (Noreen 1989; Riezler and Maxwell 2005): of each image, the captions change sides or stay, at random.

    Args:
      first, second: of the same images.
      draws, level, seed: as in `intervals`.

    Returns:
      A difference for each score that both have.

    Raises:
      ValueError: they are of other images, or of the same in another order.
    """
    if first.images != second.images:
        raise ValueError("the scores are of other images, or of the same in another order")
    names = [name for name in first.measures if name in second.measures]
    before, after = [first.measures[name] for name in names], [second.measures[name] for name in names]
    rng = np.random.default_rng(seed)
    weights = list(_bootstrap(len(first.images), draws, rng))
    drawn = _rescore(weights, after) - _rescore(weights, before)
    # The counts of both, one after the other: of each image's two, one goes to one side and one to the other.
    both = [Measure(np.concatenate([a.counts, b.counts]), a.score) for a, b in zip(after, before, strict=True)]
    sides = [rng.random((size, len(first.images))) < 0.5 for size in _sizes(draws)]
    stay = _rescore((np.hstack([side, ~side]).astype(float) for side in sides), both)
    swap = _rescore((np.hstack([~side, side]).astype(float) for side in sides), both)
    values = np.array([a.overall - b.overall for a, b in zip(after, before, strict=True)])
    # The same sum in another order differs in the last digits.
    extreme = (np.abs(stay - swap) >= np.abs(values) - 1e-12).sum(axis=0)
    return {
        name: Difference(float(value), _interval(drawn[:, i], level), float((extreme[i] + 1) / (draws + 1)))
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }


def _bootstrap(images: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each draw takes each image, (some draws, images)."""
    for size in _sizes(draws):
        yield rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)


def _sizes(draws: int) -> list[int]:
    return [min(_AT_ONCE, draws - start) for start in range(0, draws, _AT_ONCE)]


def _rescore(weights: Iterable[np.ndarray], measures: Iterable[Measure]) -> np.ndarray:
    """The scores of weighted sets, (draws, measures)."""
    measures = list(measures)
    return np.concatenate(
        [np.stack([measure.score(some @ measure.counts) for measure in measures], axis=-1) for some in weights]
    )


def _interval(values: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
