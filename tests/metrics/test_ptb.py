import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipcap_jax.metrics import ptb

DATA = Path(__file__).parents[1] / "data" / "metrics"
HARD_CASES: dict[str, dict[str, str]] = json.loads((DATA / "java_tokens_hard_cases.json").read_text("utf-8"))
SAMPLE: dict[str, str] = json.loads((DATA / "java_tokens_sample.json").read_text("utf-8"))["captions"]

JavaTokenize = Callable[[Sequence[str]], list[str]]


def test_makes_the_java_tokens_of_real_captions() -> None:
    assert dict(zip(SAMPLE, ptb.tokenize_all(list(SAMPLE)), strict=True)) == SAMPLE


@pytest.mark.parametrize("topic", HARD_CASES)
def test_makes_the_java_tokens_of_hard_cases(topic: str) -> None:
    assert {caption: ptb.tokenize(caption, following="x") for caption in HARD_CASES[topic]} == HARD_CASES[topic]


@pytest.mark.java
def test_stored_tokens_are_those_of_the_java_program(java_tokenize: JavaTokenize) -> None:
    assert dict(zip(SAMPLE, java_tokenize(list(SAMPLE)), strict=True)) == SAMPLE
    hard_cases = {caption: tokens for cases in HARD_CASES.values() for caption, tokens in cases.items()}
    with_neighbours = [line for caption in hard_cases for line in (caption, "x")]
    assert dict(zip(hard_cases, java_tokenize(with_neighbours)[::2], strict=True)) == hard_cases


@pytest.mark.parametrize(
    ("following", "last"),
    [("A bus", "s"), ("The bus", "s"), ("the bus", "s."), ("Two buses", "s."), ("", "s.")],
)
def test_an_initial_at_the_end_depends_on_the_next_caption(following: str, last: str) -> None:
    assert ptb.tokenize("The letter S.", following).split() == ["the", "letter", last]
    assert ptb.tokenize_all(["The letter S.", following])[0] == f"the letter {last}"


def test_line_breaks_are_spaces() -> None:
    assert ptb.tokenize("\n\na\r\ndog\u2028runs\x0b.\n") == "a dog runs"


# Pieces of the hard cases, so that random captions come near the rules.
PIECES = st.sampled_from(
    sorted({piece for cases in HARD_CASES.values() for caption in cases for piece in re.split(r"(\W)", caption)})
)


@given(st.text() | st.lists(PIECES).map("".join), st.text())
@example("http://\ud800 \x00\x1f\x7f\x80\x9f\ufeff\ufffe\U0010ffff", "")
def test_takes_any_text(caption: str, following: str) -> None:
    tokens = ptb.tokenize(caption, following).split(" ")
    assert tokens == [""] or all(tokens)
    assert not set(tokens) & {"'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    assert not set("".join(tokens)) & set("\n\r\u2028\u2029ABCDEFGHIJKLMNOPQRSTUVWXYZ()")


@given(st.lists(PIECES).map("".join))
def test_plain_words_make_the_tokens_that_the_rules_make(caption: str) -> None:
    """`_PLAIN_WORDS` only saves time."""
    expected = ptb.tokenize(caption)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptb, "_PLAIN_WORDS", re.compile(""))
        assert ptb.tokenize(caption) == expected


def shared_captions(shared: Path) -> dict[str, list[str]]:
    data = shared / "data"

    def read(path: str) -> Any:
        return json.loads((data / path).read_text("utf-8"))

    files = {}
    for name in ("captions_val2017", "coco_karpathy_test_gt", "coco_karpathy_val_gt"):
        files[name] = [entry["caption"] for entry in read(f"coco_captions/{name}.json")["annotations"]]
    for name in ("flickr30k_karpathy_test_captions", "flickr30k_karpathy_val_captions"):
        files[name] = [text for texts in read(f"flickr30k_captions/{name}.json").values() for text in texts]
    files["nocaps"] = [text for image in read("nocaps/nocaps_val_corpus.json") for text in image["caption"]]
    lines = (data / "flickr8k" / "captions.jsonl").read_text("utf-8").splitlines()
    files["flickr8k"] = [text for line in lines for text in json.loads(line)["captions"]]
    files["blip2"] = [entry["caption"] for entry in read("metrics/blip2_coco_karpathy_test/captions.json")]
    return files


@pytest.mark.java
@pytest.mark.slow
def test_makes_the_java_tokens_of_every_caption(shared: Path, java_tokenize: JavaTokenize) -> None:
    files = shared_captions(shared)
    assert [len(files[name]) for name in ("captions_val2017", "nocaps", "flickr8k")] == [25_014, 45_000, 40_000]
    for captions in files.values():
        assert ptb.tokenize_all(captions) == java_tokenize(captions)
