"""Which n-grams captions share with their references: the counting under BLEU and CIDEr, in sparse arrays."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, count

import numpy as np

MAX_ORDER = 4  # BLEU-4 and CIDEr both stop at 4-grams

NGram = tuple[str, ...]
_NUMBER_BITS = 32  # a caption's index and an n-gram's number share one int64


@dataclasses.dataclass(frozen=True)
class Counts:
    """Entry i: caption `caption[i]` has n-gram number `ngram[i]` `count[i]` times. Integer arrays, (entries,)."""

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], order: int, number: Callable[[NGram], int]) -> "Counts":
        """Counts the n-grams of one order in captions given as words; sorted by caption, then by number."""
        numbers = [
            list(map(number, zip(*(words[start:] for start in range(order)), strict=False))) for words in captions
        ]
        caption = np.repeat(np.arange(len(captions)), list(map(len, numbers)))
        ngram = np.fromiter(chain.from_iterable(numbers), np.int64)
        key, count = np.unique(_key(caption, ngram), return_counts=True)
        return cls(key >> _NUMBER_BITS, _number(key), count)


@dataclasses.dataclass(frozen=True)
class Matches:
    """The n-grams of one order that captions, one an image, share with references of their image."""

    captions: Counts  # of the captions, whether shared or not
    entry: np.ndarray  # (matches,) where in `captions`
    reference: np.ndarray  # (matches,) in which reference, counted through all images
    count: np.ndarray  # (matches,) how often in that reference


class ReferenceNGrams:
    """The n-grams of one order in the references of a set of images, counted once for many sets of captions."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], order: int) -> None:
        """Counts n-grams of `order` words in `references`: for each image a list of references, each its words."""
        self._order = order
        self._numbers: defaultdict[NGram, int] = defaultdict(count().__next__)  # n-grams by first appearance
        self.counts = Counts.of(list(chain.from_iterable(references)), order, self._numbers.__getitem__)
        self._keys = _key(self.counts.caption, self.counts.ngram)
        self._per_image = np.array(list(map(len, references)))
        self._first = np.cumsum(self._per_image) - self._per_image  # an image's first reference

    def document_frequency(self) -> np.ndarray:
        """In the references of how many images each n-gram occurs: integers, (n-grams,)."""
        image = np.repeat(np.arange(len(self._per_image)), self._per_image)[self.counts.caption]
        return np.bincount(_number(np.unique(_key(image, self.counts.ngram))))

    def match(self, captions: Sequence[Sequence[str]]) -> Matches:
        """Finds the n-grams of each image's caption, given as its words, in that image's references.

        N-grams that no reference has get the numbers that follow those of the references.
        """
        new: defaultdict[NGram, int] = defaultdict(count(len(self._numbers)).__next__)
        counts = Counts.of(
            captions, self._order, lambda ngram: self._numbers[ngram] if ngram in self._numbers else new[ngram]
        )
        # Look for every n-gram of a caption in every reference of its image.
        times = self._per_image[counts.caption]
        entry = np.repeat(np.arange(len(times)), times)
        within_image = np.arange(len(entry)) - np.repeat(np.cumsum(times) - times, times)
        reference = self._first[counts.caption[entry]] + within_image
        key = _key(reference, counts.ngram[entry])
        place = np.searchsorted(self._keys, key)
        found = np.append(self._keys, -1)[place] == key
        return Matches(counts, entry[found], reference[found], self.counts.count[place[found]])


def _key(caption: np.ndarray, ngram: np.ndarray) -> np.ndarray:
    return caption << _NUMBER_BITS | ngram


def _number(key: np.ndarray) -> np.ndarray:
    return key & ((1 << _NUMBER_BITS) - 1)
