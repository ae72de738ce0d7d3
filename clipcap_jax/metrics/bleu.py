"""BLEU-1 to BLEU-4 (Papineni et al., ACL 2002), with the reference length and the constants of pycocoevalcap."""

from collections.abc import Sequence

import numpy as np

from clipcap_jax.metrics.ngrams import MAX_ORDER, Matches

# pycocoevalcap keeps its fractions finite with these; they only show where nothing matches.
_TINY = 1e-15
_SMALL = 1e-9


def bleu(
    matches: Sequence[Matches], lengths: np.ndarray, reference_lengths: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """BLEU of a set of captions, one an image.

    Args:
      matches: n-grams shared with the references, for order 1 to 4.
      lengths: words of each caption, (images,).
      reference_lengths: words of each reference of each image.

    Returns:
      BLEU-1 to BLEU-4 of all captions together, float64 of shape (4,), and of each image, (images, 4). The first is
      no mean of the second: BLEU adds up its counts over the set before it divides.
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
    return _bleu(correct.sum(0), guessed.sum(0), np.sum(closest)), _bleu(correct, guessed, closest)


def _correct(shared: Matches, images: int) -> np.ndarray:
    """How many of each caption's n-grams are in a reference, each at most as often as in one reference, (images,)."""
    most = np.zeros_like(shared.captions.count)
    np.maximum.at(most, shared.entry, shared.count)
    return np.bincount(shared.captions.caption, np.minimum(shared.captions.count, most), minlength=images)


def _bleu(correct: np.ndarray, guessed: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 from counts of shape (..., 4) and lengths of shape (...)."""
    precision = (correct + _TINY) / (guessed + _SMALL)
    geometric_mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (guessed[..., 0] + _TINY) / (reference_length + _SMALL)
    brevity_penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    return geometric_mean * brevity_penalty[..., None]
