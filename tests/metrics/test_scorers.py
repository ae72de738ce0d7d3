"""Hand-computed scores, and the scorers against pycocoevalcap's on random captions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcap_jax.metrics import References
from clipcap_jax.metrics.rouge import common_subsequence_length, rouge_l


def scores_of(caption: str, references: list[str], others: dict[str, list[str]] | None = None) -> dict[str, float]:
    """Scores of one caption, in a set whose other captions repeat their first reference."""
    others = others or {}
    scores = References({"image": references, **others}).score(
        {"image": caption, **{image: texts[0] for image, texts in others.items()}}
    )
    return {name: values["image"] for name, values in scores.per_image.items()}


def test_bleu_clips_counts_and_punishes_brevity() -> None:
    scores = scores_of("the the the cat", ["the cat sat on the mat"])
    penalty = math.exp(1 - 6 / 4)
    # "the" counts twice, as in the reference; of three pairs only "the cat" is there.
    assert scores["Bleu_1"] == pytest.approx(3 / 4 * penalty)
    assert scores["Bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * penalty)
    assert scores["Bleu_3"] == pytest.approx(0, abs=1e-4)


def test_bleu_takes_the_most_of_any_reference() -> None:
    scores = scores_of("red red bus bus", ["red red car", "bus bus stop red"])
    assert scores["Bleu_1"] == pytest.approx(1)
    assert scores["Bleu_2"] == pytest.approx(math.sqrt(2 / 3))  # not "red bus"


def test_bleu_takes_the_closest_reference_length() -> None:
    assert scores_of("a b c d", ["a b c", "a b c d e"])["Bleu_1"] == pytest.approx(1)  # equally close: the shorter
    assert scores_of("a b c d", ["a", "a b c d e"])["Bleu_1"] == pytest.approx(math.exp(1 - 5 / 4))


def test_bleu_of_a_set_adds_up_counts() -> None:
    references = References({"1": ["a b"], "2": ["c d e f"]})
    scores = references.score({"1": "a x", "2": "c d e f"})
    assert scores.overall["Bleu_1"] == pytest.approx(5 / 6)
    assert scores.per_image["Bleu_1"] == pytest.approx({"1": 1 / 2, "2": 1})


def test_rouge_combines_the_best_precision_and_the_best_recall() -> None:
    precision, recall = 3 / 4, 2 / 3  # of "b c d" in the second, of "a c" in the first
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l("a b c d", ["a x c", "b c d e f g"]) == pytest.approx(expected)
    assert rouge_l("a b", ["c d"]) == 0


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, WORDS)
def test_common_subsequence_is_that_of_the_textbook(first: list[str], second: list[str]) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
    assert common_subsequence_length(first, second) == table[-1, -1]


def test_cider_weighs_rare_words() -> None:
    # "a" is in both images and weighs nothing; "b", "c", "a b" and "a c" weigh log 2; there are no triples.
    others = {"other": ["a c"]}
    assert scores_of("a b", ["a b"], others)["CIDEr"] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    assert scores_of("a c", ["a b"], others)["CIDEr"] == 0
    # A second reference that shares nothing halves the score.
    assert scores_of("a b", ["a b", "a d"], others)["CIDEr"] == pytest.approx(2.5)


def test_cider_clips_counts_and_punishes_another_length() -> None:
    # "b" twice counts once: a cosine of 1/2. "b b" is as rare as "a b": 1/sqrt(2).
    expected = 10 * (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert scores_of("a b b", ["a b"], {"other": ["a c"]})["CIDEr"] == pytest.approx(expected)


def test_cider_of_one_image_is_zero() -> None:
    assert scores_of("a b", ["a b"])["CIDEr"] == 0


CAPTIONS = st.lists(st.sampled_from(["a", "b", "c", "A", "dog's", ".", "1 1/2"]), max_size=7).map(" ".join)
IMAGES = st.lists(st.tuples(st.lists(CAPTIONS, max_size=4), CAPTIONS, CAPTIONS), min_size=1, max_size=5)


@pytest.mark.usefixtures("pycocoevalcap")
@settings(max_examples=200)
@given(IMAGES)
def test_scores_are_those_of_pycocoevalcap(images: list[tuple[list[str], str, str]]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from clipcap_jax.metrics.ptb import tokenize_all

    references = {str(i): [*some, f"{one}x"] for i, (some, one, _) in enumerate(images)}  # "x": never blank
    captions = {str(i): caption for i, (_, _, caption) in enumerate(images)}
    scores = References(references).score(captions)

    tokenised = {image: tokenize_all(texts) for image, texts in references.items()}
    results = {image: tokenize_all([caption]) for image, caption in captions.items()}
    expected = {}
    for order, (overall, per_image) in enumerate(zip(*Bleu(4).compute_score(tokenised, results, 0), strict=True)):
        expected[f"Bleu_{order + 1}"] = overall, per_image
    expected["ROUGE_L"] = Rouge().compute_score(tokenised, results)
    expected["CIDEr"] = Cider().compute_score(tokenised, results)
    assert list(scores.overall) == list(expected)
    for name, (overall, per_image) in expected.items():
        assert scores.overall[name] == pytest.approx(overall, abs=1e-12)
        np.testing.assert_allclose(list(scores.per_image[name].values()), per_image, rtol=1e-9, atol=1e-12)


def test_plain_cider_neither_clips_nor_punishes_length() -> None:
    # As above: "b" weighs log 2 and counts twice, as do not "a" and "b b"; the vectors of words are parallel.
    scores = References({"image": ["a b"], "other": ["a c"]}).score(
        {"image": "a b b", "other": "a c"}, plain_cider=True
    )
    assert scores.per_image["CIDEr_plain"]["image"] == pytest.approx(10 * (1 + 1 / math.sqrt(2)) / 4)
