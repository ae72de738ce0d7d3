import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tiny import Source
from tokenizers import models, pre_tokenizers

from clipcap_jax.captioning.batches import BatchCaptioner
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.captioning.settings import _banned
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def captioner(embeddings_run: Path) -> Captioner:
    return Captioner.load(embeddings_run)


def test_a_call_searches_as_it_is_told(captioner: Captioner, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = np.load(source.embeddings)[:5]
    configured = captioner.with_decode(DecodeConfig(3, 6, 0.5, ""))
    expected = configured.caption(embeddings)
    assert captioner.caption(embeddings, beam_size=3, max_tokens=6, length_penalty=0.5) == expected
    assert all(len(caption.text) > 0 for caption in expected)
    monkeypatch.setattr(BatchCaptioner, "__init__", None)  # no program is made anew
    assert captioner.caption(embeddings, beam_size=3, max_tokens=6, length_penalty=0.5) == expected


def test_the_best_of_the_beam(captioner: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)[:5]
    found = captioner.caption(embeddings, n=4)
    for best in found:
        scores = [caption.score for caption in best]
        assert len({caption.text for caption in best}) == 4
        assert scores == sorted(scores, reverse=True)
    assert [best[0] for best in found] == captioner.caption(embeddings, beam_size=4)
    assert captioner.caption(embeddings[0], n=1) == [captioner.caption(embeddings[0])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0: it has to be a whole number from 1 on"),
        ({"n": True}, "n is True"),
        ({"n": 3, "beam_size": 2}, "n is 3, but a beam of 2 holds no more than 2"),
        ({"beam_size": 2.0}, "beam_size is 2.0: it has to be a whole number"),
        ({"beam_size": 321}, "beam size is 321, but the vocabulary has only"),
        ({"max_tokens": 23}, "take up to 25 positions, but GPT-2 has 24"),
        ({"length_penalty": -1}, "length_penalty is -1: it has to be from 0 on"),
        ({"length_penalty": math.nan}, "length_penalty is nan: it has to be a number"),
        ({"temperature": 0}, "temperature is 0: it has to be above 0"),
        ({"temperature": "hot"}, "temperature is 'hot': it has to be a number"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5: it has to be above 0, up to 1"),
        ({"seed": -1}, "seed is -1: it has to be a whole number from 0"),
        ({"seed": 1, "beam_size": 2}, "beam_size is of a search, while"),
        ({"temperature": 1e-45}, "temperature is 1e-45: it has to be above 0"),
        ({"temperature": 10**400}, "it has to be a number, as float32 has it"),
        ({"rows": [0.5]}, "rows have to be whole numbers"),
        ({"rows": [], "seed": 0}, "rows has 0 numbers, fewer than there are inputs"),
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"min_tokens": 17}, "min_tokens is 17, more than max_tokens, 16: raise that, too"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it has to be above 0"),
        ({"banned": "dog"}, "banned is 'dog': it has to be a list of texts"),
        ({"banned": 3}, "banned is 3"),
        ({"banned": ["dog", " "]}, "a banned text is empty"),
        ({"banned": [b"dog"]}, "a banned text is b'dog': it has to be a text"),
        ({"prompt": 3}, "prompt is 3: it has to be a text"),
        ({"prompt": "\udcff"}, r"prompt is '\\udcff': it has to be a text"),
        ({"prompt": "A red dog", "banned": ["red"]}, "the prompt has 'red', which is banned"),
        ({"prompt": "word " * 20}, r"prefix, prompt and caption take up to \d+ positions, but GPT-2 has 24"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"errors": "ignore"}, "errors is 'ignore': it can be"),
    ],
)
def test_mistakes(captioner: Captioner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        captioner.caption(np.ones((1, 5), np.float32), **options)


def test_what_asks_for_nothing(captioner: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)[:5]
    expected = captioner.caption(embeddings)
    assert captioner.caption(embeddings, prompt=" ", banned=[], repetition_penalty=1, min_tokens=1) == expected


def test_rows_are_what_drawing_depends_on(captioner: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)[:9]
    whole = captioner.caption(embeddings, seed=5, temperature=3.0)
    parts = [captioner.caption(embeddings[at::2], seed=5, temperature=3.0, rows=range(at, 9, 2)) for at in (0, 1)]
    assert [caption.text for caption in parts[0]] == [caption.text for caption in whole[::2]]
    assert [caption.text for caption in parts[1]] == [caption.text for caption in whole[1::2]]


def test_a_prompt_that_the_tokenizer_has_no_pieces_for(captioner: Captioner) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "dog": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    knows_little = copy.copy(captioner)
    knows_little.metadata = dataclasses.replace(captioner.metadata, tokenizer=Tokenizer(words))
    with pytest.raises(UserError, match="prompt is 'dog 狗 cat', but the tokenizer has no piece for '狗', 'cat'"):
        knows_little.caption(np.ones(5), prompt="dog 狗 cat")
    np.testing.assert_array_equal(_banned(Tokenizer(words), ["cat", "dog", "the dog"], []), [[2]])
