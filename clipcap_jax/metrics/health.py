"""Whether captions are worth scoring: a captioner that hardly looks at its pictures says the same of most."""

from collections.abc import Sequence

from clipcap_jax.metrics.words import Words, split_all


def health(captions: Sequence[str], finished: Sequence[bool] | None = None, words: Words = "ptb") -> dict[str, float]:
    """Counts over a set of captions, under the names that reports show.

    Args:
      captions: raw text, at least one.
      finished: whether each ended by itself rather than at the length limit, where that is known.
      words: see `words.split_all`.
    """
    split = [text.split() for text in split_all(captions, words)]
    found = {
        "captions": len(captions),
        "distinct captions": len({" ".join(caption) for caption in split}),
        "empty captions": sum(not caption for caption in split),
        "distinct words": len({word for caption in split for word in caption}),
        "words per caption": sum(map(len, split)) / len(captions),
    }
    return found if finished is None else {**found, "unfinished captions": len(finished) - sum(finished)}
