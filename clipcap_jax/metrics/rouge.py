"""ROUGE-L (Lin 2004): the longest common subsequence of words, as pycocoevalcap scores it."""

from collections.abc import Sequence

_BETA = 1.2  # recall weighs this much more than precision


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L of one image, from tokens joined by spaces: the F-score of the best precision and the best recall.

    As in pycocoevalcap, a text without tokens is one empty word here, so nothing is divided by 0.
    """
    words, reference_words = caption.split(" "), [reference.split(" ") for reference in references]
    common = [common_subsequence_length(words, reference) for reference in reference_words]
    precision = max(common) / len(words)
    recall = max(length / len(reference) for length, reference in zip(common, reference_words, strict=True))
    if precision == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_subsequence_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): bit i of `row` is 0 where the table of the textbook's dynamic programme rises by one
    at word i of `first`, so each word of `second` updates a whole row of that table in four integer operations.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    all_ones = (1 << len(first)) - 1
    row = all_ones
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(first) - row.bit_count()
