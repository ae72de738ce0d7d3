"""CLIP's tokenizer: a lower-cased byte-level BPE whose pieces at a word's end are marked `</w>`.

As openai/CLIP, clip/simple_tokenizer.py, and `tokenize` in clip/clip.py, but for the repairs of the package ftfy, which
it runs first: of those there is only the Unicode normal form NFC. So curly quotes, ligatures, letters of full width and
wrongly decoded text stay as they are, as they do in Hugging Face's CLIP tokenizer.
"""

import gzip
import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from clipcap_jax import hub
from clipcap_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# Hugging Face's files, and OpenAI's.
FILES = ("tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
_LONGEST_LINE = 1000  # characters
_OPENAI_MERGES = 49152 - 256 - 2  # OpenAI's file holds five times as many


class ClipTokenizer:
    """Text to ids.

    Attributes:
      size: all ids are below it; the greatest is the end token's.
    """

    def __init__(self, model: models.BPE):
        self._tokenizer = tokenizers.Tokenizer(model)
        self.size: int = self._tokenizer.get_vocab_size()
        start, end = map(self._tokenizer.token_to_id, (START, END))
        if model.end_of_word_suffix != _WORD_END or start is None or end != self.size - 1:
            raise UserError(f"its pieces do not mark a word's end with {_WORD_END}, or {END} is not the last of them")
        if sorted(self._tokenizer.get_vocab().values()) != list(range(self.size)):
            raise UserError("the ids of its pieces are not all numbers from 0 on, each once")
        self._start, self._end = start, end
        self._tokenizer.add_special_tokens([START, END])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of each text from the start token to the end token, both included in `length`; what is longer is cut."""
        encodings = self._tokenizer.encode_batch(list(map(_clean, texts)), add_special_tokens=False)
        return [[self._start, *encoding.ids[: length - 2], self._end] for encoding in encodings]

    @classmethod
    def load(cls, source: str) -> "ClipTokenizer":
        """A tokenizer from `tokenizer.json`, from `vocab.json` and `merges.txt`, or from OpenAI's vocabulary.

        Args:
          source: one of `FILES`, or a folder or a repository of the Hugging Face hub with one of them.

        Raises:
          UserError: there is none, or it is broken or not CLIP's.
        """
        try:
            return cls(_read(source))
        except UserError as error:
            raise UserError(f"no tokenizer of CLIP in {source}: {error}") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises nothing more specific, and Rust's panics are no Exception
            raise UserError(f"the tokenizer in {source} cannot be read: {error}") from error


def _read(source: str) -> models.BPE:
    path = hub.locate(source, FILES)
    if path.suffix == ".gz":
        return _read_openai(path)
    if path.name != "vocab.json":
        return tokenizers.Tokenizer.from_file(str(path)).model
    merges = path.with_name("merges.txt")
    if not merges.is_file():  # not yet downloaded
        merges = hub.locate(source, (merges.name,))
    return models.BPE.from_file(str(path), str(merges), end_of_word_suffix=_WORD_END)


def _read_openai(path: Path) -> models.BPE:
    """A pair a line, the most frequent first, after a line that names the file's version."""
    with gzip.open(path, "rt", encoding="utf-8") as file:  # a line at a time: a small file may hold any number
        lines = [file.readline(_LONGEST_LINE).rstrip("\n") for _ in range(_OPENAI_MERGES + 1)][1:]
    lines = list(filter(None, lines))
    if len(lines) < _OPENAI_MERGES:
        raise UserError(f"it has {len(lines)} merges, CLIP's {_OPENAI_MERGES}")
    merges = [(first, second) for first, second in map(str.split, lines)]
    # The ids of the bytes are in the order of the characters that stand for them.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), START, END]
    return models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, end_of_word_suffix=_WORD_END)


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return " ".join(text.split()).lower()
