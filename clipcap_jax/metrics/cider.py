"""CIDEr-D (Vedantam et al., CVPR 2015): what pycocoevalcap, and with it every paper, calls CIDEr; and CIDEr itself."""

from collections.abc import Sequence

import numpy as np

from clipcap_jax.metrics.ngrams import Matches, ReferenceNGrams

_SIGMA = 6.0  # in words: how fast the score falls with the difference of the lengths


class Cider:
    """Scores captions against the references of a set of images.

    An n-gram weighs its count times log(images / images with it in a reference), so a score depends on the whole set:
    those of two sets do not compare, and in a set of one image every weight, and the score, is 0.
    """

    def __init__(self, ngrams: ReferenceNGrams, reference_lengths: Sequence[Sequence[int]]):
        """Takes the references' n-grams, and how many words each reference of each image has."""
        self._image = np.repeat(np.arange(len(reference_lengths)), list(map(len, reference_lengths)))  # (references,)
        self._lengths = np.concatenate(reference_lengths)  # (references,)
        self._rarest = np.log(len(reference_lengths))
        self._weights = [self._rarest - np.log(images) for images in ngrams.document_frequency]  # (n-grams,) an order
        self._norms = [
            _norm(counts.caption, counts.count * weights[counts.ngram], len(self._image))
            for counts, weights in zip(ngrams.counts, self._weights, strict=True)
        ]  # (references,) an order

    def score(self, matches: Sequence[Matches], lengths: np.ndarray, *, plain: bool = False) -> np.ndarray:
        """CIDEr-D of each image's caption: float64 of shape (images,), from 0 to 10.

        Args:
          matches: n-grams shared with the references, for order 1 to 4.
          lengths: words of each caption, (images,).
          plain: CIDEr instead, which neither clips counts nor punishes another length (the paper's equation 3).
        """
        cosine = np.mean(
            [
                self._cosine(shared, weights, norms, clip=not plain)
                for shared, weights, norms in zip(matches, self._weights, self._norms, strict=True)
            ],
            axis=0,
        )
        if plain:
            return 10 * np.bincount(self._image, cosine) / np.bincount(self._image)
        # pycocoevalcap takes the number of word pairs for the length: no word and one word are both 0 long.
        difference = np.maximum(lengths - 1, 0)[self._image] - np.maximum(self._lengths - 1, 0)
        similarity = cosine * np.exp(-(difference**2) / (2 * _SIGMA**2))
        return 10 * np.bincount(self._image, similarity) / np.bincount(self._image)

    def _cosine(self, shared: Matches, weights: np.ndarray, reference_norms: np.ndarray, *, clip: bool) -> np.ndarray:
        """Similarity of each reference to its image's caption in n-grams of one order: (references,)."""
        captions = shared.captions
        known = captions.ngram < len(weights)
        weight = np.full(len(known), self._rarest)
        weight[known] = weights[captions.ngram[known]]
        count = captions.count[shared.entry]
        if clip:  # saying a word more often than the reference does earns nothing
            count = np.minimum(count, shared.count)
        product = np.bincount(
            shared.reference, count * shared.count * weight[shared.entry] ** 2, minlength=len(self._image)
        )
        images = self._image[-1] + 1
        norms = _norm(captions.caption, captions.count * weight, images)[self._image] * reference_norms
        return np.divide(product, norms, out=np.zeros_like(norms), where=norms != 0)


def _norm(row: np.ndarray, value: np.ndarray, rows: int) -> np.ndarray:
    """Euclidean norms of the rows of a sparse matrix."""
    return np.sqrt(np.bincount(row, value**2, minlength=rows))
