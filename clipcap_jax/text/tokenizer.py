"""GPT-2's tokenizer, any other fast Hugging Face tokenizer, or a byte-level BPE trained on the captions."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from clipcap_jax import hub
from clipcap_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# GPT-2's vocabulary and merges, as on the hub and as OpenAI names them.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# What is written without spaces: Chinese characters, kana and their punctuation; beside them, digits and quotes too.
_UNSPACED = (
    "[\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff]"
)
_BESIDE = "[0-9\u2014\u2018-\u201d\u2026]"
_NEEDLESS_SPACE = re.compile(f"(?<={_UNSPACED}) (?={_UNSPACED}|{_BESIDE})|(?<={_BESIDE}) (?={_UNSPACED})")


class Tokenizer:
    """Text to ids and back, with the id that ends a caption.

    Attributes:
      size: all ids are below it.
      end_id: the id of the end-of-text token.
      unknown_id: the id of what there is no piece for; None where there is none, as in byte-level tokenizers.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_token: str = END_OF_TEXT, *, clean_up: bool = False):
        """A tokenizer of the library `tokenizers`; `clean_up`: texts come back without spaces before punctuation."""
        end_id = tokenizer.token_to_id(end_token)
        if end_id is None:
            raise UserError(f"the tokenizer has no end-of-text token {end_token!r}")
        # A file may ask that texts be cut, or filled up to the longest.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A caption that holds the text of a special token does not end there. Files do not say this: it is set anew.
        tokenizer.add_special_tokens([end_token])
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._end_token = end_token
        # Those of WordPiece look at a piece at a time, and leave "don ' t".
        self._clean_up: bool = clean_up or getattr(tokenizer.decoder, "cleanup", False)
        # All other decoders give the spaces that there were; these put one before each word, and what
        # `BertPreTokenizer` takes for a word is any single Chinese character.
        self._spaced = isinstance(tokenizer.decoder, decoders.WordPiece | decoders.BPEDecoder | None)
        self.end_id: int = end_id
        self.unknown_id = _unknown_id(tokenizer)
        # Not the number of pieces: where ids have gaps, that is less.
        self.size: int = max(tokenizer.get_vocab().values()) + 1

    def encode(self, captions: Sequence[str], *, strip: bool = True) -> list[list[int]]:
        """Ids of each caption, without the end token and, unless told otherwise, without surrounding white space."""
        texts = [caption.strip() if strip else caption for caption in captions]
        return [self._ids(encoding) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _ids(self, encoding: tokenizers.Encoding) -> list[int]:
        """A vocabulary of whole words has the end token among them: as a word of a caption, it is an unknown one."""
        ids = [self.unknown_id if token == self.end_id else token for token in encoding.ids]
        return [token for token in ids if token is not None]

    def unknown(self, caption: str) -> list[str]:
        """The parts of a caption that are read as `unknown_id`."""
        text = caption.strip()
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = (self.unknown_id, self.end_id)
        return [text[slice(*at)] for token, at in zip(encoding.ids, encoding.offsets, strict=True) if token in unknown]

    def decode(self, ids: Iterable[int]) -> str:
        """The text as it is written, up to the first end token, without surrounding white space.

        Ids beyond `size` are left out.
        """
        tokens = []
        for token in map(int, ids):
            if token == self.end_id:
                break
            tokens.append(token)
        text = self._tokenizer.decode(tokens)
        if self._spaced:
            text = _NEEDLESS_SPACE.sub("", text)
        if self._clean_up:  # as transformers' `clean_up_tokenization`
            text = re.sub(r" (?=[.?!,]|n't|'(?:m|s|ve|re))", "", text.replace(" ' ", "'"))
        return text.strip()

    def piece(self, token: int) -> str:
        """What an id stands for, with its space; the end token by its name."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def stop_id(self, stop: str) -> int:
        """The id that ends a caption: the end of text, or the first of `stop`, as the original takes it for ".".

        Raises:
          UserError: the tokenizer has no piece for `stop`.
        """
        if stop.strip() in ("", self._end_token):
            return self.end_id
        ids = self.encode([stop])[0]
        if not ids or ids[0] == self.unknown_id:
            raise UserError(f"no caption can end with {stop!r}, which the tokenizer has no piece for")
        return ids[0]

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether an id means the same in both."""
        return self.end_id == other.end_id and self._tokenizer.get_vocab() == other._tokenizer.get_vocab()

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, as checkpoints store it: the `tokenizer.json` text and what is not in it."""
        return {
            "tokenizer_json": self._tokenizer.to_str(),
            "end_token": self._end_token,
            "clean_up": self._clean_up,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Tokenizer":
        """The inverse of `to_dict`; older versions stored no `clean_up`."""
        tokenizer = tokenizers.Tokenizer.from_str(stored["tokenizer_json"])
        return cls(tokenizer, stored["end_token"], clean_up=stored.get("clean_up", False))

    @classmethod
    def _as_stored(cls, tokenizer: "Tokenizer") -> "Tokenizer":
        """As checkpoints will have it, which shall fail now rather than then."""
        ids = tokenizer._tokenizer.get_vocab().values()
        if len({*ids}) < len(ids):  # one of two would be lost
            raise ValueError("two pieces have one id")
        return cls.from_dict(tokenizer.to_dict())

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> "Tokenizer":
        """A byte-level BPE like GPT-2's, with at most `size` ids (at least 257), learnt from the captions."""
        if size < 257:
            raise UserError(f"a byte-level BPE needs at least 257 pieces (256 bytes and the end of text), not {size}")
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((caption.strip() for caption in captions), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, source: str) -> "Tokenizer":
        """A tokenizer from a folder or, by name ("gpt2", "gpt2@REVISION"), from the Hugging Face hub.

        A folder is read as the same files on the hub are, by transformers. Where that cannot, it may hold GPT-2's
        vocabulary and merges alone: `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe` as OpenAI names
        them.

        Raises:
          UserError: when the folder lacks its files or they are broken, or the hub does not give the name.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            return cls._from_hub(source)
        try:
            return cls._as_stored(cls._from_folder(folder))
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # nothing more specific is raised, and Rust's panics are no Exception
            names = sorted(path.name for path in folder.iterdir())
            raise UserError(
                f"the tokenizer in {folder} cannot be read: {_reason(error)} There has to be a tokenizer.json; or "
                "other files, such as vocab.txt, with the tokenizer_config.json or config.json that says of which kind "
                "they are; or vocab.json and merges.txt, or encoder.json and vocab.bpe, of GPT-2's kind. "
                f"There is {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}."
            ) from error

    @classmethod
    def _from_folder(cls, folder: Path) -> "Tokenizer":
        whole = folder / "tokenizer.json"
        found = [pair for pair in _GPT2_FILES if all((folder / name).is_file() for name in pair)]
        try:
            tokenizer = cls._from_pretrained(str(folder))
        except (OSError, ValueError):
            if whole.is_file() or not found:
                raise
            vocabulary, merges = (str(folder / name) for name in found[0])
            return cls(_byte_level(models.BPE.from_file(vocabulary, merges)))
        # transformers makes another tokenizer of its pieces where the config is of another kind.
        if whole.is_file() and _probe(tokenizers.Tokenizer.from_file(str(whole))) != _probe(tokenizer._tokenizer):
            raise UserError(
                f"transformers does not read {whole} as it is written, as the tokenizer_config.json or config.json "
                "beside it names a tokenizer of another kind: let the former say "
                '"tokenizer_class": "PreTrainedTokenizerFast", and the end of text as "eos_token".'
            )
        return tokenizer

    @classmethod
    def _from_hub(cls, name: str) -> "Tokenizer":
        repository, _, revision = name.partition("@")
        try:
            return cls._from_pretrained(repository, revision or "main", cached=bool(hub.unreachable()))
        except UserError:
            raise
        except Exception as error:  # of the network, of tokenizers, and of packages that a tokenizer asks for
            reason = f"{lost}." if (lost := hub.unreachable()) else _reason(error)
            raise UserError(
                f"there is no folder {name!r}, and the Hugging Face hub gave no tokenizer of that name: "
                f"{reason} Offline, name a folder with the tokenizer's files."
            ) from error

    @classmethod
    def _from_pretrained(cls, source: str, revision: str = "main", *, cached: bool = False) -> "Tokenizer":
        from transformers import AutoTokenizer  # takes seconds to import, and most runs do not need it

        # No code of the folder's or the repository's is run, nor is anybody asked whether it should be.
        try:
            pretrained = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False, local_files_only=cached
            )
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise UserError(f"{source} has a tokenizer with code of its own, which is not run here") from None
        if not pretrained.is_fast:
            raise UserError(f"{source} has only a slow tokenizer; a fast one (tokenizer.json) is needed")
        tokenizer = pretrained.backend_tokenizer
        # Without its vocabulary, transformers makes one of the special tokens, and T5's space.
        if tokenizer.get_vocab_size() - len(tokenizer.get_added_tokens_decoder()) < 2:
            raise ValueError("there is no vocabulary.")
        # `tokenizer_config.json` names it; a folder may hold `tokenizer.json` alone.
        end_token = pretrained.eos_token or pretrained.sep_token or END_OF_TEXT
        # In byte-level pieces spaces are letters; transformers leaves them alone whatever the config says.
        clean_up = pretrained.clean_up_tokenization_spaces and not isinstance(tokenizer.model, models.BPE)
        return cls(tokenizer, end_token, clean_up=clean_up)


def _unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    model = json.loads(tokenizer.to_str())["model"]  # the one place that says it of all kinds of models
    return model["unk_id"] if "unk_id" in model else tokenizer.token_to_id(model.get("unk_token") or "")


def _probe(tokenizer: tokenizers.Tokenizer) -> list[int]:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode("A dog's 2 BALLS, Straße. 一个男孩", add_special_tokens=False).ids


def _reason(error: BaseException) -> str:
    # transformers takes what it cannot read as sentencepiece's, even for want of that package, for tiktoken's.
    if "`tiktoken` is required" in str(error):
        return "a file such as spiece.model has to be whole, and needs sentencepiece: pip install sentencepiece."
    if str(error).startswith("Couldn't instantiate the backend"):
        return "transformers does not know the files."
    return f"{str(error).partition(chr(10))[0].rstrip('. ')}."


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
