"""Whether captions are worth scoring: a captioner that hardly looks at its pictures says the same of most."""

from collections.abc import Sequence

from clipcap_jax.metrics.ptb import tokenize_all


def health(captions: Sequence[str], finished: Sequence[bool] | None = None) -> dict[str, float]:
    """Counts over a set of captions, under the names that reports show.

    Args:
      captions: raw text, at least one.
      finished: whether each ended by itself rather than at the length limit, where that is known.
    """
    words = [text.split() for text in tokenize_all(captions)]
    found = {
        "captions": len(captions),
        "distinct captions": len({" ".join(caption) for caption in words}),
        "empty captions": sum(not caption for caption in words),
        "distinct words": len({word for caption in words for word in caption}),
        "words per caption": sum(map(len, words)) / len(captions),
    }
    return found if finished is None else {**found, "unfinished captions": len(finished) - sum(finished)}
