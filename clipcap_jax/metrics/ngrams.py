"""Which n-grams captions share with their references: the counting under BLEU and CIDEr, in sparse arrays.

Every n-gram has a number, by order: a word by first appearance, a longer one by its place among the sorted keys of all
n-grams of its order. A key is the number of the n-gram without its last word and the number of that word, in one int64.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, count

import numpy as np

MAX_ORDER = 4  # BLEU-4 and CIDEr both stop at 4-grams

_BITS = 32  # two numbers share an int64


@dataclasses.dataclass(frozen=True)
class Counts:
    """Entry i: caption `caption[i]` has n-gram number `ngram[i]` `count[i]` times. Integers, (entries,)."""

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Matches:
    """The n-grams of one order that captions, one an image, share with references of their image."""

    captions: Counts  # of the captions, whether shared or not
    entry: np.ndarray  # (matches,) where in `captions`
    reference: np.ndarray  # (matches,) in which reference, counted through all images
    count: np.ndarray  # (matches,) how often in that reference


class ReferenceNGrams:
    """The n-grams of the references of a set of images, counted once for many sets of captions.

    Attributes:
      counts: of the references, counted through all images; one for each order from 1 to 4.
      document_frequency: in the references of how many images each n-gram occurs, (n-grams,); one for each order.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]):
        """Counts, for each image, n-grams in a list of references, each given as its words."""
        self._words: defaultdict[str, int] = defaultdict(count().__next__)
        self._keys: list[np.ndarray] = []  # sorted, of order 2, 3 and 4

        def number(keys: np.ndarray) -> np.ndarray:
            known, numbers = np.unique(keys, return_inverse=True)
            self._keys.append(known)
            return numbers

        self.counts = _count(list(chain.from_iterable(references)), self._words.__getitem__, number)
        self._per_image = np.array(list(map(len, references)))
        self._first = np.cumsum(self._per_image) - self._per_image  # an image's first reference
        image = np.repeat(np.arange(len(references)), self._per_image)
        self.document_frequency = [
            np.bincount(_split(np.unique(_join(image[counts.caption], counts.ngram)))[1]) for counts in self.counts
        ]

    def match(self, captions: Sequence[Sequence[str]]) -> list[Matches]:
        """Finds the n-grams of each image's caption, given as its words, in that image's references, by order.

        N-grams that no reference has get the numbers that follow those of the references.
        """
        new: defaultdict[str, int] = defaultdict(count(len(self._words)).__next__)
        known = iter(self._keys)
        counts = _count(
            captions,
            lambda word: self._words[word] if word in self._words else new[word],
            lambda keys: _look_up(next(known), keys),
        )
        return list(map(self._match, counts, self.counts))

    def _match(self, captions: Counts, references: Counts) -> Matches:
        # Look for every n-gram of a caption in every reference of its image.
        times = self._per_image[captions.caption]
        entry = np.repeat(np.arange(len(times)), times)
        within_image = np.arange(len(entry)) - np.repeat(np.cumsum(times) - times, times)
        reference = self._first[captions.caption[entry]] + within_image
        place, found = _find(_join(references.caption, references.ngram), _join(reference, captions.ngram[entry]))
        return Matches(captions, entry[found], reference[found], references.count[place[found]])


def _count(
    captions: Sequence[Sequence[str]],
    word_number: Callable[[str], int],
    ngram_numbers: Callable[[np.ndarray], np.ndarray],
) -> list[Counts]:
    """Counts n-grams of order 1 to 4 in captions given as words; sorted by caption, then by number."""
    lengths = np.array(list(map(len, captions)))
    words = np.fromiter(map(word_number, chain.from_iterable(captions)), np.int64, lengths.sum())
    caption = np.repeat(np.arange(len(captions)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words from here to the caption's end
    start, ngram = np.arange(len(words)), words  # where each n-gram starts, and its number
    result = []
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            longer = left[start] >= order
            start = start[longer]
            ngram = ngram_numbers(_join(ngram[longer], words[start + order - 1]))
        keys, counts = np.unique(_join(caption[start], ngram), return_counts=True)
        result.append(Counts(*_split(keys), counts))
    return result


def _look_up(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Places of `keys` in `known`, which is sorted; keys that are not there get the numbers after it."""
    numbers, found = _find(known, keys)
    numbers[~found] = len(known) + np.unique(keys[~found], return_inverse=True)[1]
    return numbers


def _find(known: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of `keys` in `known`, which is sorted, and whether they are there."""
    places = np.searchsorted(known, keys)
    return places, np.append(known, -1)[places] == keys


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first << _BITS | second


def _split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return keys >> _BITS, keys & ((1 << _BITS) - 1)
