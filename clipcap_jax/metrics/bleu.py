"""BLEU-1 to BLEU-4 (Papineni et al., ACL 2002), with the reference length and the constants of pycocoevalcap."""

import functools
from collections.abc import Sequence

import numpy as np

from clipcap_jax.metrics.measure import Measure
from clipcap_jax.metrics.ngrams import MAX_ORDER, Matches

# pycocoevalcap keeps its fractions finite with these; they only show where nothing matches.
_TINY = 1e-15
_SMALL = 1e-9


def bleu(matches: Sequence[Matches], lengths: np.ndarray, reference_lengths: Sequence[Sequence[int]]) -> list[Measure]:
    """BLEU-1 to BLEU-4, which add up their counts over a set before they divide.

    Args:
      matches: n-grams shared with the references, for order 1 to 4.
      lengths: words of each caption, (images,).
      reference_lengths: words of each reference of each image.
    """
    correct = np.stack([_correct(shared, len(lengths)) for shared in matches], axis=-1)
    guessed = np.maximum(lengths[:, None] - np.arange(MAX_ORDER), 0)
    # Of an image's references the one closest in length to the caption counts; of two equally close the shorter.
    closest = np.array(
        [
            min(of_image, key=lambda reference: (abs(reference - length), reference))
            for length, of_image in zip(lengths.tolist(), reference_lengths, strict=True)
        ]
    )
    counts = np.concatenate([correct, guessed, closest[:, None]], axis=1)  # images 9
    return [Measure(counts, functools.partial(_bleu, order)) for order in range(1, MAX_ORDER + 1)]


def _correct(shared: Matches, images: int) -> np.ndarray:
    """How many of each caption's n-grams are in a reference, each at most as often as in one reference, (images,)."""
    most = np.zeros_like(shared.captions.count)
    np.maximum.at(most, shared.entry, shared.count)
    return np.bincount(shared.captions.caption, np.minimum(shared.captions.count, most), minlength=images)


def _bleu(order: int, counts: np.ndarray) -> np.ndarray:
    """BLEU up to an order, from counts of shape (..., 9): correct and guessed n-grams, and the references' length."""
    correct, guessed, reference_length = np.split(counts, [MAX_ORDER, 2 * MAX_ORDER], axis=-1)
    precision = (correct + _TINY) / (guessed + _SMALL)
    geometric_mean = np.prod(precision[..., :order], axis=-1) ** (1 / order)
    ratio = (guessed[..., 0] + _TINY) / (reference_length[..., 0] + _SMALL)
    return geometric_mean * np.exp(np.minimum(1 - 1 / ratio, 0))
