"""METEOR (Denkowski & Lavie, 2014): its authors' Java program, which pycocoevalcap brings along, matches the words."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from clipcap_jax.metrics import java
from clipcap_jax.metrics.measure import Measure
from clipcap_jax.progress import screen, track

_MEMORY = "-Xmx2G"  # pycocoevalcap's limit; the table of paraphrases alone needs a quarter of it
_START_SECONDS = 120.0  # to load the table of paraphrases: seven seconds on two cores
_IMAGE_SECONDS = 0.1  # one millisecond on two cores

# What the program says of a caption and its best reference: words and function words of the two, 4; matched content
# words and function words in either, for exact words, stems, synonyms and paraphrases, 16; chunks; matched words, 2.
_COUNTS = 23
_CHUNKS = 20
# Its parameters for English.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """METEOR, from text tokenised by `ptb.tokenize_all`.

    Raises:
      java.Unavailable: Java or pycocoevalcap is missing, or the program failed or took too long.
    """
    program, jar = find()
    answers = java.run(
        "METEOR",
        program,
        # One thread: the program has no use for more.
        [_MEMORY, "-XX:+UseSerialGC", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
        lines=_questions(captions, references),
        seconds=_START_SECONDS + _IMAGE_SECONDS * len(captions),
    )
    bar = screen(stderr=True)
    with contextlib.closing(answers):
        lines = list(track(answers, "METEOR", total=len(captions), console=bar, transient=True))
    try:
        counts = np.array([line.split() for line in lines], np.float64).reshape(len(captions), _COUNTS)
    except ValueError as error:
        raise java.Unavailable(
            f"METEOR's Java program gave {len(lines)} answers for {len(captions)} captions, the last one: {lines[-1:]}"
        ) from error
    # A caption that matches word for word, in one chunk, is not fragmented at all.
    whole = (counts[:, _CHUNKS] == 1) & (counts[:, [0, 1]] == counts[:, _CHUNKS + 1 :]).all(axis=1)
    counts[whole, _CHUNKS] = 0
    return Measure(counts, _score)


def find() -> tuple[str, Path]:
    """Java, and METEOR's program.

    Raises:
      java.Unavailable: one of them is missing.
    """
    return java.find("METEOR", at_least=8), java.pycocoevalcap("METEOR", "meteor", "meteor-1.5.jar")


def _questions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Iterator[str]:
    for caption, texts in zip(captions, references, strict=True):
        yield " ||| ".join(field.replace("|||", "") for field in ("SCORE", *texts, caption))


def _score(counts: np.ndarray) -> np.ndarray:
    """The formula of the paper's section 2, as in the program's `MeteorScorer.computeMetrics`."""
    words, function_words = counts[..., 0:2], counts[..., 2:4]  # caption and reference
    matches = counts[..., 4:_CHUNKS].reshape(*counts.shape[:-1], 4, 2, 2)  # matchers, content or function, in which
    weighted = np.einsum("...mki,m,k->...i", matches, _MATCHERS, [_DELTA, 1 - _DELTA])
    length = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    share = np.divide(weighted, length, out=np.zeros_like(length), where=length > 0)
    precision, recall = share[..., 0], share[..., 1]
    denominator = (1 - _ALPHA) * recall + _ALPHA * precision
    mean = np.divide(precision * recall, denominator, out=np.zeros_like(denominator), where=denominator > 0)
    matched = counts[..., _CHUNKS + 1 :].mean(axis=-1)
    fragmentation = np.divide(counts[..., _CHUNKS], matched, out=np.zeros_like(matched), where=matched > 0)
    return mean * (1 - _GAMMA * fragmentation**_BETA)
