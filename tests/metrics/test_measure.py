import numpy as np

from clipcap_jax.metrics.measure import Measure, mean


def test_a_score_of_sums() -> None:
    ratio = Measure(np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 2.0]]), lambda counts: counts[..., 0] / counts[..., 1])
    assert ratio.overall == 4 / 8
    assert ratio.per_image.tolist() == [0.5, 0.75, 0]
    part = ratio.select(np.array([1, 2]))
    assert part.overall == 3 / 6
    assert part.per_image.tolist() == [0.75, 0]


def test_a_mean() -> None:
    measure = mean([1.0, 2.0, 6.0])
    assert measure.overall == 3
    assert measure.per_image.tolist() == [1, 2, 6]
