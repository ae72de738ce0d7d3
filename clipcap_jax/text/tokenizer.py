"""GPT-2's tokenizer, any other fast Hugging Face tokenizer, or a byte-level BPE trained on the captions."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from clipcap_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to ids and back, with the id that ends a caption.

    Attributes:
      size: all ids are below it.
      end_id: the id of the end-of-text token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_token: str = END_OF_TEXT):
        end_id = tokenizer.token_to_id(end_token)
        if end_id is None:
            raise UserError(f"the tokenizer has no end-of-text token {end_token!r}")
        self._tokenizer = tokenizer
        self._end_token = end_token
        self.end_id: int = end_id
        # Not the number of pieces: where ids have gaps, that is less.
        self.size: int = max(tokenizer.get_vocab().values()) + 1

    def encode(self, captions: Sequence[str], *, strip: bool = True) -> list[list[int]]:
        """Ids of each caption, without the end token and, unless told otherwise, without surrounding white space."""
        texts = [caption.strip() if strip else caption for caption in captions]
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end token, without surrounding white space; ids beyond `size` are left out."""
        text = []
        for token in map(int, ids):
            if token == self.end_id:
                break
            text.append(token)
        return self._tokenizer.decode(text).strip()

    def stop_id(self, stop: str) -> int:
        """The id that ends a caption: the end of text, or the first of `stop`, as the original takes it for ".".

        Raises:
          UserError: the tokenizer knows nothing of `stop`.
        """
        if not stop.strip():
            return self.end_id
        if not (ids := self.encode([stop])[0]):
            raise UserError(f"captions are to stop at {stop!r}, of which the tokenizer knows nothing")
        return ids[0]

    def to_dict(self) -> dict[str, str]:
        """What `from_dict` needs, as checkpoints store it: the `tokenizer.json` text and the end token."""
        return {"tokenizer_json": self._tokenizer.to_str(), "end_token": self._end_token}

    @classmethod
    def from_dict(cls, stored: dict[str, str]) -> "Tokenizer":
        """The inverse of `to_dict`."""
        return cls(tokenizers.Tokenizer.from_str(stored["tokenizer_json"]), stored["end_token"])

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

        A folder holds `tokenizer.json`, or GPT-2's vocabulary and merges: `vocab.json` and `merges.txt` as on the hub,
        `encoder.json` and `vocab.bpe` as OpenAI names them.

        Raises:
          UserError: when the folder lacks its files or they are broken, or the hub does not give the name.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            return cls._from_hub(source)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls._as_stored(cls._from_pretrained(str(folder)))
            for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (folder / vocabulary).is_file() and (folder / merges).is_file():
                    tokenizer = _byte_level(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
                    tokenizer.add_special_tokens([END_OF_TEXT])
                    return cls._as_stored(cls(tokenizer))
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises nothing more specific, and Rust's panics are no Exception
            raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt, "
            f"or encoder.json and vocab.bpe; it holds {found}"
        )

    @classmethod
    def _from_hub(cls, name: str) -> "Tokenizer":
        repository, _, revision = name.partition("@")
        try:
            return cls._from_pretrained(repository, revision or "main")
        except (OSError, ValueError) as error:
            raise UserError(
                f"there is no folder {name!r}, and the Hugging Face hub gave no tokenizer of that name. "
                "Offline, name a folder with the tokenizer's files."
            ) from error

    @classmethod
    def _from_pretrained(cls, source: str, revision: str = "main") -> "Tokenizer":
        from transformers import AutoTokenizer  # takes seconds to import, and most runs do not need it

        # No code of the folder's or the repository's is run, nor is anybody asked whether it should be.
        try:
            pretrained = AutoTokenizer.from_pretrained(
                source, revision=revision, use_fast=True, trust_remote_code=False
            )
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise UserError(f"{source} has a tokenizer with code of its own, which is not run here") from None
        if not pretrained.is_fast:
            raise UserError(f"{source} has only a slow tokenizer; a fast one (tokenizer.json) is needed")
        # `tokenizer_config.json` names it; a folder may hold `tokenizer.json` alone.
        end_token = pretrained.eos_token or pretrained.sep_token or END_OF_TEXT
        return cls(pretrained.backend_tokenizer, end_token)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
