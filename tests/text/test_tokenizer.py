import io
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from openai_bpe import Gpt2Bpe
from tokenizers import decoders, models, pre_tokenizers

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
    assert gpt2.encode(["<|endoftext|>"]) == [[27, 91, 437, 1659, 5239, 91, 29]]
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


# Chinese as BERT reads it, and English of whole words and pieces.
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"一个男孩在看\uff0c。“”3.,'at",
    "the",
    "red",
    "dog",
    "##s",
    "don",
]
BERT = {"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}


def write(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write(tmp_path / "bert", BERT))


@pytest.mark.parametrize(
    ("files", "size", "end_id"),
    [
        (BERT, len(WORDS), 3),
        ({"vocab.txt": BERT["vocab.txt"], "config.json": '{"model_type": "bert"}'}, len(WORDS), 3),
        ({**BERT, "special_tokens_map.json": '{"eos_token": "[MASK]"}'}, len(WORDS), 4),
        (
            {
                **BERT,
                "special_tokens_map.json": '{"eos_token": "[EOS]"}',
                "added_tokens.json": f'{{"cat": {len(WORDS)}, "[EOS]": {len(WORDS) + 1}}}',
            },
            len(WORDS) + 2,
            len(WORDS) + 1,
        ),
    ],
)
def test_a_folder_is_read_as_on_the_hub(files: dict[str, str], size: int, end_id: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, files))
    assert (tokenizer.size, tokenizer.end_id) == (size, end_id)
    pieces = [WORDS.index(piece) for piece in ("一", "个", "男", "孩", "red", "dog", "##s", ".")]
    assert tokenizer.encode(["一个男孩 red dogs."]) == [pieces]
    if "added_tokens.json" in files:
        assert tokenizer.encode(["cat"]) == [[len(WORDS)]]


def test_gpt2s_files_are_read_with_the_config_of_their_model(trained: Tokenizer, tmp_path: Path) -> None:
    """Of OpenAI's names transformers knows none, and makes a tokenizer without a vocabulary."""
    model = json.loads(trained.to_dict()["tokenizer_json"])["model"]
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        files = dict(zip(names, (json.dumps(model["vocab"]), merges), strict=True))
        for config in ({}, {"config.json": '{"model_type": "gpt2"}'}, {"tokenizer_config.json": "{}"}):
            tokenizer = Tokenizer.load(write(tmp_path / f"{names[0]}{len(config)}", {**files, **config}))
            assert tokenizer.same_ids(trained)
            assert tokenizer.encode(CAPTIONS) == trained.encode(CAPTIONS)


def test_a_tokenizer_that_transformers_makes_another_of(bert: Tokenizer, trained: Tokenizer, tmp_path: Path) -> None:
    """A config of GPT-2 makes it byte-level, whatever the file says, and drops what is done to the text before."""
    lower = json.loads(trained.to_dict()["tokenizer_json"]) | {"normalizer": {"type": "Lowercase"}}
    for tokenizer, end in ((bert.to_dict()["tokenizer_json"], "[SEP]"), (json.dumps(lower), "<|endoftext|>")):
        files = {"tokenizer.json": tokenizer, "config.json": '{"model_type": "gpt2"}'}
        with pytest.raises(UserError, match=r"does not read .*tokenizer\.json as it is written, .*eos_token"):
            Tokenizer.load(write(tmp_path / end, files))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        loaded = Tokenizer.load(write(tmp_path / end, {"tokenizer_config.json": json.dumps(config)}))
        assert loaded.encode(["the DOGS"]) == Tokenizer(tokenizers.Tokenizer.from_str(tokenizer), end).encode(
            ["the DOGS"]
        )


@pytest.mark.parametrize(
    "text",
    [
        "一个男孩在看。",
        "一个男孩\uff0c“看”。",
        "3个男孩",
        "一个 red dog 在看",  # Latin words keep their spaces
        "the red dogs.",
        "the dog, a dog.",
        "don't",
    ],
)
def test_what_is_decoded_is_what_one_writes(text: str, bert: Tokenizer) -> None:
    for tokenizer in (bert, Tokenizer.from_dict(bert.to_dict())):
        assert tokenizer.decode([*tokenizer.encode([text])[0], tokenizer.end_id, 5]) == text


def test_spaces_that_were_there_stay(trained: Tokenizer) -> None:
    """Between words of Chinese that somebody has taken apart."""
    assert trained.decode(trained.encode(["一个 男孩 \uff0c 3 个"])[0]) == "一个 男孩 \uff0c 3 个"


@pytest.mark.parametrize("clean_up", ["true", "false"])
def test_spaces_before_punctuation_go_where_the_config_says_so(clean_up: str, tmp_path: Path) -> None:
    """As in transformers."""
    from transformers import AutoTokenizer

    words = ["<unk>", "</s>", "the", "dog", *".,!?'s", "n't", "'m", "'s", "'ve", "'re"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": clean_up == "true",
    }
    write(tmp_path, {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)})
    ours, theirs = Tokenizer.load(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("the dog .", "the ' s dog , ! ?", " ".join(words[2:])):
        (ids,) = ours.encode([text])
        expected = theirs.decode(ids)
        assert (expected == text) == (clean_up == "false")
        assert ours.decode(ids) == Tokenizer.from_dict(ours.to_dict()).decode(ids) == expected


def test_spaces_before_punctuation_are_letters_of_byte_level_pieces(trained: Tokenizer, tmp_path: Path) -> None:
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": true}'
    write(tmp_path, {"tokenizer.json": trained.to_dict()["tokenizer_json"], "tokenizer_config.json": config})
    assert Tokenizer.load(str(tmp_path)).decode(trained.encode(["a dog . "])[0]) == "a dog ."


@pytest.mark.parametrize("special", [True, False])
def test_no_text_is_an_end(special: bool, trained: Tokenizer, bert: Tokenizer) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "dog": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (words.add_special_tokens if special else words.add_tokens)(["</s>"])
    for tokenizer, end in ((trained, "<|endoftext|>"), (bert, "[SEP]"), (Tokenizer(words, "</s>"), "</s>")):
        for same in (tokenizer, Tokenizer.from_dict(tokenizer.to_dict())):
            (ids,) = same.encode([f"dog {end} dog"])
            assert same.end_id not in ids
            assert same.decode(ids).startswith("dog ")
            assert same.decode(ids).endswith(" dog")
            assert same.stop_id(end) == same.end_id
    stored = trained.to_dict()
    declared = json.dumps({**json.loads(stored["tokenizer_json"]), "added_tokens": []})
    if not special:
        declared = stored["tokenizer_json"].replace('"special":true', '"special":false')
    for same in (trained, Tokenizer.from_dict({**stored, "tokenizer_json": declared})):
        assert same.decode(same.encode(["a <|endoftext|>."])[0]) == "a <|endoftext|>."


def test_a_file_that_cuts_and_fills_texts(trained: Tokenizer, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(trained.to_dict()["tokenizer_json"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=5)
    loaded = Tokenizer.load(write(tmp_path, {"tokenizer.json": tokenizer.to_str()}))
    assert loaded.encode(["a", "a dog's ball"]) == trained.encode(["a", "a dog's ball"])


def test_what_is_unknown(trained: Tokenizer, bert: Tokenizer) -> None:
    assert trained.unknown_id is None
    assert bert.unknown_id == 1
    assert bert.encode(["一个猫, the cat"])[0].count(1) == 2
    assert bert.unknown(" 一个猫, the cat") == ["猫", "cat"]
    assert bert.unknown("一个男孩") == trained.unknown("一个猫") == []
    unigram = tokenizers.Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0), ("<unk>", 0.0)], unk_id=2))
    unigram.decoder = decoders.Metaspace()
    assert Tokenizer(unigram, "</s>").unknown_id == 2
    assert Tokenizer(unigram, "</s>").unknown("aba") == ["b"]
    with pytest.raises(UserError, match=r"no caption can end with '!', which the tokenizer has no piece for"):
        bert.stop_id("!")
    assert bert.stop_id("。") == WORDS.index("。")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"transformers does not know the files\. There has to be a tokenizer\.json; .* There is nothing\."),
        (
            {"vocab.txt": "a"},
            r"does not know the files\. .* that says of which kind they are; .* There is vocab\.txt\.",
        ),
        ({"vocab.json": "{}"}, r"There is vocab\.json\."),
        # transformers makes a vocabulary of the special tokens
        (
            {"config.json": '{"model_type": "gpt2"}', "vocab.txt": "a"},
            r"there is no vocabulary\. .* is config\.json, voc",
        ),
        ({"config.json": '{"model_type": "bert"}'}, r"there is no vocabulary\."),
        ({"config.json": '{"model_type": "t5"}'}, r"there is no vocabulary\."),
        (
            {"config.json": '{"model_type": "t5"}', "spiece.model": "a"},
            r"pip install sentencepiece\. .* spiece\.model\.",
        ),
        ({f"{i:02}": "" for i in range(30)}, r"There is 00, 01, .*, 19, \.\.\.\.$"),
    ],
)
def test_a_folder_without_a_tokenizer(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the tokenizer in .* cannot be read: .*{message}"):
        Tokenizer.load(write(tmp_path, files))


def without_end(trained: Tokenizer) -> str:
    return trained.to_dict()["tokenizer_json"].replace("<|endoftext|>", "<end>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{broken"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": ""}, "cannot be read"),
        ({"tokenizer.json": "", "vocab.json": '{"<|endoftext|>": 0}', "merges.txt": ""}, "cannot be read"),
        ({**BERT, "tokenizer_config.json": "[1]"}, "cannot be read"),
        ({"tokenizer.json": without_end}, r"no end-of-text token '<\|endoftext\|>'"),
        ({"vocab.json": "{broken", "merges.txt": ""}, "cannot be read"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "cannot be read"),
        ({"encoder.json": "[]", "vocab.bpe": ""}, "cannot be read"),
        (
            {"vocab.json": '{"a": 0, "b": 1, "<|endoftext|>": 1}', "merges.txt": ""},
            "cannot be read: two pieces have one",
        ),
        (
            {"vocab.json": '{"a": 0, "b": 1, "ab": 1, "<|endoftext|>": 2}', "merges.txt": "a b"},
            "two pieces have one id",
        ),
    ],
)
def test_broken_files(files: dict[str, Any], message: str, trained: Tokenizer, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content(trained) if callable(content) else content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) or "end-of-text" in message


def test_a_stop_that_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"no caption can end with '\.', which the tokenizer has no piece for"):
        Tokenizer.load(str(tmp_path)).stop_id(".")


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


def test_a_panic_of_rust_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no `Exception`; but whoever stops the program is not kept from it."""

    def fail(error: type[BaseException]) -> None:
        def raise_it(*_: object) -> None:
            raise error("range end index 17 out of range")

        monkeypatch.setattr(models.BPE, "from_file", raise_it)

    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    fail(type("PanicException", (BaseException,), {}))
    with pytest.raises(UserError, match="cannot be read: range end index 17 out of range"):
        Tokenizer.load(str(tmp_path))
    fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.load(str(tmp_path))
