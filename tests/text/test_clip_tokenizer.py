import gzip
import json
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from clip_files import VOCAB_SIZE, in_hub_cache, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai_bpe import ClipBpe

from clipcap_jax.errors import UserError
from clipcap_jax.text.clip_tokenizer import ClipTokenizer

START, END = 49406, 49407
CAPTIONS = [
    "A photo depicts ",
    "It's  3 o'clock,\tthey'LL  say",
    "naïve Straße 漢字 🐕‍🦺 ΑΣ İ",
    "x\u00a0y\u2028z",
    "!!??...--__<|3",
    "12345 &amp;lt; &eacute;",
    "cafe\u0301",
]


@pytest.fixture(scope="session")
def openai_file(shared: Path) -> Path:
    return shared / "data" / "tokenizers" / "clip" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="session")
def clip(openai_file: Path) -> ClipTokenizer:
    return ClipTokenizer.load(str(openai_file.parent))


@pytest.fixture(scope="session")
def openai(openai_file: Path) -> ClipBpe:
    return ClipBpe(openai_file)


@pytest.fixture
def tiny(tmp_path: Path) -> ClipTokenizer:
    return ClipTokenizer.load(str(write_tokenizer(tmp_path / "tiny")))


def test_known_ids(clip: ClipTokenizer) -> None:
    """From OpenAI's and Hugging Face's documentation."""
    assert clip.size == 49408
    assert clip.encode(["a photo of a cat", "Hello world!"], 77) == [
        [START, 320, 1125, 539, 320, 2368, END],
        [START, 3306, 1002, 256, END],
    ]


def test_equals_openais(clip: ClipTokenizer, openai: ClipBpe, shared: Path) -> None:
    annotations = json.loads((shared / "data" / "coco_captions" / "captions_val2017.json").read_text())["annotations"]
    captions = [annotation["caption"] for annotation in annotations[::10]] + CAPTIONS[:-1]
    assert clip.encode(captions, 77) == [[START, *openai.encode(caption)[:75], END] for caption in captions]

    # The libraries know different versions of Unicode, but all of them this old one.
    known = st.characters(exclude_categories=["Cs"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")

    @given(st.text(known, max_size=20))
    def any_text(text: str) -> None:
        # The Unicode normal form is ftfy's work there, and four control characters are white space to Python alone.
        text = unicodedata.normalize("NFC", text).translate(dict.fromkeys(range(0x1C, 0x20), " "))
        assert clip.encode([text], 77) == [[START, *openai.encode(text), END]]

    any_text()


def test_what_is_no_letter_of_a_caption(clip: ClipTokenizer) -> None:
    same = ["a dog & a cat\u00e9", " A  DOG &amp;amp;\n a cate\u0301 ", "a dog &amp; a cat&eacute;"]
    first, *others = clip.encode(same, 77)
    assert others == [first, first]


def test_a_long_text_keeps_its_end(clip: ClipTokenizer, tiny: ClipTokenizer) -> None:
    for tokenizer in (clip, tiny):
        whole, cut = (tokenizer.encode(["dog " * 100], length)[0] for length in (200, 77))
        assert (len(whole), len(cut)) == (102, 77)
        assert cut == [*whole[:76], tokenizer.size - 1]
        exact, shorter = tokenizer.encode(["dog " * 75, "dog " * 74], 77)
        assert (exact, len(shorter)) == (cut, 76)


def test_hugging_faces_files(clip: ClipTokenizer, openai: ClipBpe, tmp_path: Path) -> None:
    """From both, the same ids as from OpenAI's file, and as transformers gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTokenizer
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    parts.mkdir()
    (parts / "vocab.json").write_text(json.dumps(openai.ids))
    merges = "".join(f"{first} {second}\n" for first, second in openai.ranks)
    (parts / "merges.txt").write_text("#version: 0.2\n" + merges)
    theirs = CLIPTokenizer(vocab=openai.ids, merges=list(openai.ranks))
    theirs.save_pretrained(whole)
    assert (whole / "tokenizer.json").is_file()
    # Transformers does not unescape, and knows no sigma for the end of a word.
    texts = [text for text in CAPTIONS if not set("&Σ") & set(text)]
    expected = theirs(texts, truncation=True, max_length=77)["input_ids"]
    for source in (parts, parts / "vocab.json", whole, whole / "tokenizer.json"):
        found = ClipTokenizer.load(str(source))
        assert found.size == 49408
        assert found.encode(texts, 77) == clip.encode(texts, 77) == expected


def test_an_empty_text(tiny: ClipTokenizer) -> None:
    assert tiny.size == VOCAB_SIZE
    assert tiny.encode(["", " \n"], 77) == [[VOCAB_SIZE - 2, VOCAB_SIZE - 1]] * 2
    assert tiny.encode([], 77) == []


def change_vocabulary(folder: Path, change: Any) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(change(vocabulary)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "holds none of tokenizer.json, vocab.json, bpe_simple_voca"),
        (lambda folder: (folder / "merges.txt").unlink(), "holds none of merges.txt"),
        (lambda folder: (folder / "merges.txt").write_text("nowhere to_be_found"), "cannot be read"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (
            lambda folder: change_vocabulary(folder, lambda ids: ids | {"<|endoftext|>": 7, "!": len(ids) - 1}),
            r"<|endoftext|> is not the last",
        ),
        (lambda folder: change_vocabulary(folder, lambda ids: ids | {"more": len(ids)}), "is not the last of them"),
        (lambda folder: change_vocabulary(folder, lambda ids: ids | {"!": 2**31}), "not all numbers from 0 on"),
    ],
)
def test_broken_files(damage: Any, message: str, tmp_path: Path) -> None:
    damage(write_tokenizer(tmp_path / "tiny"))
    with pytest.raises(UserError) as raised:
        ClipTokenizer.load(str(tmp_path / "tiny"))
    assert message in str(raised.value)
    assert str(tmp_path / "tiny") in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text", "cannot be read"),
        (gzip.compress(b"version\na b\nb c\n" * 1000)[:-9], "cannot be read"),
        (gzip.compress(b"version\n" + b"ab\n" * 50000), "cannot be read"),
        (gzip.compress(b"version\na b\nb c"), "it has 2 merges, CLIP's 48894"),
        (b"", "it has 0 merges, CLIP's 48894"),
    ],
    ids=["not gzip", "cut off", "no pairs", "too few", "empty"],  # not the bytes, which hold the time
)
def test_a_broken_file_of_openais(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(data)
    with pytest.raises(UserError) as raised:
        ClipTokenizer.load(str(tmp_path))
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    from clipcap_jax.text.tokenizer import Tokenizer

    trained = Tokenizer.train(["a dog"], 260)
    (tmp_path / "tokenizer.json").write_text(trained.to_dict()["tokenizer_json"])
    with pytest.raises(UserError, match=r"no tokenizer of CLIP in .*: its pieces do not mark a word's end with </w>"):
        ClipTokenizer.load(str(tmp_path))


def test_the_hubs_cache_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = write_tokenizer(in_hub_cache(tmp_path, "a/clip"))
    dog = VOCAB_SIZE - 2 - 3
    for source in ("a/clip", f"a/clip@{snapshot.name}", str(snapshot)):
        assert ClipTokenizer.load(source).encode(["dog"], 77) == [[VOCAB_SIZE - 2, dog, VOCAB_SIZE - 1]]
    (snapshot / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer of CLIP in a/clip: .* the Hugging Face hub did not give it"):
        ClipTokenizer.load("a/clip")
