import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcap_jax.config import EvaluateConfig
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import References, score_domains, words
from clipcap_jax.metrics.health import health
from clipcap_jax.metrics.ptb import tokenize_all
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.metrics.words import are_unspaced, split_all

DATA = Path(__file__).parents[1] / "data" / "metrics"
REFERENCES = {
    "0": ["桌子上放着三个苹果", "木桌上有三个红苹果"],
    "1": ["一只猫在窗边睡觉", "猫睡在窗台旁边"],
    "2": ["孩子们在公园里放风筝", "公园里孩子在放风筝"],
}
CAPTIONS = {"0": "木桌上放着三个苹果", "1": "一只猫睡在窗边", "2": "孩子们在公园放风筝"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只iPhone 14手机\uff0c在桌上\uff01", "一 只 iphone 14 手 机 在 桌 上"),
        ("犬がボールで「遊ぶ」。", "犬 が ボ ー ル で 遊 ぶ"),
        ("𠮷野家", "𠮷 野 家"),  # beyond the characters that Java keeps
        ("สุนัขวิ่ง", "สุ นั ข วิ่ ง"),  # marks stay with their letter
        ("ၼႃး ខ្ញុំ ໝາ", "ၼႃး ខ្ ញុំ ໝ າ"),
        ("A dog's U.S. flag (red).", "a dog 's u.s. flag -lrb- red -rrb-"),
        ("", ""),
    ],
)
def test_characters(text: str, expected: str) -> None:
    assert split_all([text], "characters") == [expected]


def test_english_is_split_alike() -> None:
    sample, hard = (
        json.loads((DATA / f"java_tokens_{name}.json").read_text("utf-8")) for name in ("sample", "hard_cases")
    )
    texts = [*sample["captions"], *(text for cases in hard.values() for text in cases if text.isascii())]
    assert split_all(texts, "characters") == split_all(texts, "ptb") == tokenize_all(texts)


@given(st.text("a b.'S一ก่、", max_size=12))
def test_no_character_is_lost_and_none_joins_another(text: str) -> None:
    kept = split_all([text], "characters")[0].split()
    assert [word[0] for word in kept if word[0] in "一ก"] == [letter for letter in text if letter in "一ก"]
    assert all(set(word[1:]) <= {"่"} for word in kept if word[0] in "一ก")


def test_segmented_text_and_a_function() -> None:
    assert split_all(["木桌  上 放着"], "spaces") == ["木桌 上 放着"]
    assert split_all(["木桌上"], lambda text: [text[:2], text[2:]]) == ["木桌 上"]
    with pytest.raises(UserError, match="words are 'jieba': they can be 'ptb', 'characters', 'spaces' or a function"):
        split_all([""], "jieba")  # type: ignore[arg-type]


def test_which_texts_have_no_spaces() -> None:
    for text in ("一只猫", "犬がいる", "สุนัข", "ໝາ", "ខ្មែរ", "မြန်မာ", "རྒྱལ", "iPad在木桌子上"):
        assert are_unspaced([text, text, "a cat"]), text
    for text in ("a cat", "ein Hündchen", "собака", "강아지 한 마리", "कुत्ता", "iPhone的", "12。", ""):
        assert not are_unspaced([text, text, "一只猫"]), text


def test_chinese_scores_as_if_it_had_spaces() -> None:
    """And not 0, as without; the same words by a function, and from texts that are segmented already."""

    def spaced(text: str) -> str:
        return " ".join(text)

    segmented = {image: list(map(spaced, texts)) for image, texts in REFERENCES.items()}
    with_spaces = {image: spaced(text) for image, text in CAPTIONS.items()}
    expected = References(segmented).score(with_spaces).overall
    assert expected["CIDEr"] > 5
    assert References(REFERENCES).score(CAPTIONS).overall["CIDEr"] == 0
    assert References(REFERENCES, "characters").score(CAPTIONS).overall == expected
    assert References(REFERENCES, list).score(CAPTIONS).overall == expected
    assert References(segmented, "spaces").score(with_spaces).overall == expected
    assert health(list(CAPTIONS.values()), words="characters")["words per caption"] == pytest.approx(25 / 3)


def test_what_the_words_are_is_told() -> None:
    domains = {"0": "indoors", "1": "indoors", "2": ""}

    def content(counted: words.Words) -> Any:
        scores = References(REFERENCES, counted).score(CAPTIONS)
        parts = score_domains(REFERENCES, CAPTIONS, domains, scores)
        assert (parts["indoors"].overall["Bleu_1"] > 1e-9) == (counted != "ptb")
        card = Scorecard(scores, parts, {}, {"checkpoint": "step 7"})
        assert f"- words: {words.name_of(counted)}\n" in card.to_markdown("")
        assert all(note in card.facts()["note"] for note in card.notes)
        return json.loads(card.to_json())

    ptb, characters = content("ptb"), content("characters")
    assert ptb["details"] == {"checkpoint": "step 7", "words": "ptb"}
    assert characters["details"] == {"checkpoint": "step 7", "words": "characters"}
    assert content(list)["details"] == {"checkpoint": "step 7", "words": "list"}
    unspaced, few, few_of_domain = ptb["notes"]
    assert "script without spaces" in unspaced
    assert "--words characters" in unspaced
    assert few.startswith("CIDEr says little of 3 pictures")
    assert few_of_domain.startswith("Of indoors: CIDEr says little of 2 pictures")
    assert characters["notes"] == [few, few_of_domain]


def test_few_pictures() -> None:
    def notes(images: int) -> tuple[str, ...]:
        return References({str(i): ["a dog runs"] for i in range(images)}).notes

    assert notes(10) == ()
    assert len(notes(9)) == len(notes(1)) == 1
    assert "of a single picture" in notes(1)[0]
    assert References({"1": ["a dog runs"]}).score({"1": "a dog runs"}).overall["CIDEr"] == 0  # as the note says


def test_programs_that_know_english_alone_are_not_asked() -> None:
    scores = References(REFERENCES, "characters").score(CAPTIONS, meteor=True)
    assert scores.not_computed["METEOR"].startswith("it knows English alone")
    assert "'characters'" in scores.not_computed["METEOR"]


def test_a_config_can_name_the_same() -> None:
    assert get_args(get_type_hints(EvaluateConfig)["words"]) == words.NAMED
