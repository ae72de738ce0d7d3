"""A score of a set of captions, kept so that any part of the set, or any resampling of it, can be scored again."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score as a function of counts that add up over images.

    Attributes:
      counts: what each image adds, float64 of shape (images, counts).
      score: from counts of shape (..., counts) to scores of shape (...): of one image, or of the sum over several.
    """

    counts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def overall(self) -> float:
        """The score of the whole set."""
        return float(self.score(self.counts.sum(axis=0)))

    @property
    def per_image(self) -> np.ndarray:
        """The score of each image alone, (images,); BLEU and METEOR of the set are no means of it."""
        return self.score(self.counts)

    def select(self, images: np.ndarray) -> "Measure":
        """Of some of the images."""
        return Measure(self.counts[images], self.score)


def mean(values: Sequence[float] | np.ndarray) -> Measure:
    """A score that is the mean of its values for each image."""
    values = np.asarray(values, np.float64)
    return Measure(np.stack([values, np.ones_like(values)], axis=-1), _mean)


def _mean(counts: np.ndarray) -> np.ndarray:
    return counts[..., 0] / counts[..., 1]
