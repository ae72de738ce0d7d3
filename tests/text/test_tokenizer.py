import io
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_bpe import Gpt2Bpe

from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer

CAPTIONS = ["A dog runs.", "two dogs run after a ball", " a dog's ball ", "a ball", ""]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 290)


@pytest.fixture(scope="session")
def gpt2_folder(shared: Path) -> Path:
    return shared / "data" / "tokenizers" / "gpt2"


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(gpt2_folder))


def test_gpt2_known_ids(gpt2: Tokenizer) -> None:
    """From OpenAI's and Hugging Face's documentation."""
    assert (gpt2.size, gpt2.end_id) == (50257, 50256)
    assert gpt2.encode(["Hello world", " Hello, my dog is cute\n"]) == [
        [15496, 995],
        [15496, 11, 616, 3290, 318, 13779],
    ]
    assert gpt2.encode(["<|endoftext|>"]) == [[50256]]
    assert gpt2.decode([15496, 995, 50256, 15496]) == "Hello world"


def test_gpt2_equals_openais(gpt2: Tokenizer, gpt2_folder: Path, shared: Path) -> None:
    openai = Gpt2Bpe(gpt2_folder)
    annotations = json.loads((shared / "data" / "coco_captions" / "captions_val2017.json").read_text())["annotations"]
    captions = [annotation["caption"] for annotation in annotations[::100]]
    captions += [
        "It's  3 o'clock,\tthey'll  say",
        "naïve Straße 漢字 🐕‍🦺",
        "x\u00a0y\u2028z",
        "!!??...--__",
        "1234567",
    ]
    assert gpt2.encode(captions) == [openai.encode(caption.strip()) for caption in captions]

    @given(st.text(max_size=20))
    def any_text(text: str) -> None:
        assert gpt2.encode([text]) == [openai.encode(text.strip())]
        assert gpt2.decode(gpt2.encode([text])[0]) == text.strip()

    any_text()


def test_gpt2_under_its_other_names_is_the_same(gpt2: Tokenizer, gpt2_folder: Path, tmp_path: Path) -> None:
    hub, one_file, with_config = (tmp_path / name for name in ("hub", "one_file", "with_config"))
    hub.mkdir()
    shutil.copy(gpt2_folder / "encoder.json", hub / "vocab.json")
    shutil.copy(gpt2_folder / "vocab.bpe", hub / "merges.txt")
    for folder in (one_file, with_config):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(gpt2.to_dict()["tokenizer_json"])
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (with_config / "tokenizer_config.json").write_text(json.dumps(settings))
    for folder in (hub, one_file, with_config):
        other = Tokenizer.load(str(folder))
        assert (other.size, other.end_id) == (gpt2.size, gpt2.end_id)
        assert other.encode(CAPTIONS) == gpt2.encode(CAPTIONS)
        assert other.decode([1169, 3290, 50256]) == "the dog"


@given(st.text())
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    (ids,) = trained.encode([text])
    assert all(0 <= token < trained.size and token != trained.end_id for token in ids)
    assert trained.decode(ids) == text.strip()


def test_decode_stops_at_the_end_and_leaves_out_what_is_no_piece(trained: Tokenizer) -> None:
    dog, ball = trained.encode(["a dog", "a ball"])
    assert trained.decode([*dog, trained.end_id, *ball]) == "a dog"
    assert trained.decode([trained.end_id, *ball]) == trained.decode([]) == ""
    assert trained.decode([*dog, trained.size, trained.size + 1000]) == "a dog"


def test_white_space_around_a_caption_is_dropped(trained: Tokenizer) -> None:
    assert trained.encode([" a dog \n"]) == trained.encode(["a dog"])


def test_training_joins_the_most_frequent_pair() -> None:
    tokenizer = Tokenizer.train(["xyxyxy", "yz", "yz"], 258)
    assert tokenizer.size == 258
    assert {len(ids) for ids in tokenizer.encode(["xy", "x", "y"])} == {1}
    assert len(tokenizer.encode(["yz"])[0]) == 2


@pytest.mark.parametrize(("limit", "pieces"), [(257, ["a", "", "d", "o", "g"]), (270, ["a", "dog"])])
def test_training_uses_the_size_it_is_given(limit: int, pieces: list[str]) -> None:
    tokenizer = Tokenizer.train(CAPTIONS, limit)
    assert tokenizer.size == limit
    assert [tokenizer.decode([token]) for token in tokenizer.encode(["a dog"])[0]] == pieces


def test_training_ends_when_every_word_is_a_piece() -> None:
    tokenizer = Tokenizer.train(CAPTIONS, 5000)
    assert tokenizer.size < 300
    assert len(tokenizer.encode(["two dogs run after a ball"])[0]) == 6


def test_too_few_pieces() -> None:
    with pytest.raises(UserError, match=r"at least 257 pieces .* not 256"):
        Tokenizer.train(CAPTIONS, 256)


def test_training_gives_the_same_every_time(trained: Tokenizer) -> None:
    assert Tokenizer.train(iter(CAPTIONS), 290).to_dict() == trained.to_dict()
    assert Tokenizer.train(CAPTIONS[:2], 290).to_dict() != trained.to_dict()


def test_it_can_be_stored(trained: Tokenizer) -> None:
    stored = json.loads(json.dumps(trained.to_dict()))
    restored = Tokenizer.from_dict(stored)
    assert restored.to_dict() == trained.to_dict()
    assert (restored.size, restored.end_id) == (trained.size, trained.end_id)
    assert restored.encode(CAPTIONS) == trained.encode(CAPTIONS)


def test_ids_with_gaps_are_below_the_size(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 7, "ab": 9, "<|endoftext|>": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode(["ab", "ba"]) == [[9], [7, 0]]
    assert (tokenizer.size, tokenizer.end_id) == (10, 4)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs tokenizer\.json, or vocab\.json and merges\.txt, .*; it holds nothing"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds vocab\.json"):
        Tokenizer.load(str(tmp_path))


def without_end(trained: Tokenizer) -> str:
    return trained.to_dict()["tokenizer_json"].replace("<|endoftext|>", "<end>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{broken"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": ""}, "cannot be read"),
        ({"tokenizer.json": without_end}, r"no end-of-text token '<\|endoftext\|>'"),
        ({"vocab.json": "{broken", "merges.txt": ""}, "cannot be read"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "cannot be read"),
        ({"encoder.json": "[]", "vocab.bpe": ""}, "cannot be read"),
    ],
)
def test_broken_files(files: dict[str, Any], message: str, trained: Tokenizer, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content(trained) if callable(content) else content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) or "end-of-text" in message


def test_no_code_of_a_folder_is_run(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anybody asked whether it should be."""
    (tmp_path / "tokenizer.json").write_text(trained.to_dict()["tokenizer_json"])
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass Evil: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match=r"has a tokenizer with code of its own, which is not run here$"):
        Tokenizer.load(str(tmp_path))
    assert not (tmp_path / "mark").exists()
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no-such-owner/no-such-tokenizer", "no/such/folder", "no such name"])
def test_a_hub_name_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UserError, match=rf"no folder '{name}', .* Offline, name a folder with the tokenizer's files"):
        Tokenizer.load(name)


def test_the_token_that_stops() -> None:
    tokenizer = Tokenizer.train(["a dog runs.", "a cat sleeps."], 270)
    assert tokenizer.stop_id("") == tokenizer.end_id
    assert tokenizer.encode(["."]) == [[tokenizer.stop_id(".")]]
    assert tokenizer.stop_id(".") != tokenizer.end_id
    first, second = tokenizer.encode(["?."])[0]
    assert tokenizer.stop_id("?.") == first != second  # the original looks at the first alone
