"""What a checkpoint says about its model, in this format and those before it."""

import copy
import dataclasses
from typing import Any

from clipcap_jax import config as config_lib
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer

FORMAT_VERSION = 6

# Settings that a format brought, and what was the only way before.
_SINCE: dict[int, dict[str, Any]] = {
    2: {
        "model.mapper.dropout": 0.0,
        "train.pretrained": {"clip": "", "gpt2": ""},
        "train.targets": "all",
        "evaluate.decode.stop": "",
    },
    3: {"optimizer.average_decay": 0.0},
    4: {"model.gpt2.word_dropout": 0.0},
    5: {
        "train.accumulation": 1,
        "train.remat": False,
        "train.gradient_dtype": "float32",
        "parallel": {"layout": "data"},
    },
    6: {"evaluate.words": "ptb"},
}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about its model.

    Attributes:
      config: the run's.
      tokenizer: the one it was trained with.
      encoder: the name of what made the embeddings it reads, "" when it reads pictures or that is not known.
      embedding_width: E.
    """

    config: config_lib.Config
    tokenizer: Tokenizer
    encoder: str
    embedding_width: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.to_dict(),
            "encoder": self.encoder,
            "embedding_width": self.embedding_width,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Metadata":
        stored = upgraded(stored)
        return cls(
            config=config_lib.from_dict(stored["config"]),
            tokenizer=Tokenizer.from_dict(stored["tokenizer"]),
            encoder=stored["encoder"],
            embedding_width=stored["embedding_width"],
        )


def upgraded(stored: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an older format, with what was the only way then for each setting that has come since.

    Raises:
      UserError: they have a format that is not known.
    """
    stored = copy.deepcopy(stored)
    for version, settings in _SINCE.items():
        if stored.get("format_version") == version - 1:
            for name, value in settings.items():
                *path, last = name.split(".")
                part = stored["config"]
                for key in path:
                    part = part[key]
                part[last] = value
            stored["format_version"] = version
    version = stored.get("format_version", "of another program")
    if version != FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format {version}, and this clipcap_jax reads format {FORMAT_VERSION}: "
            "install the version of clipcap_jax that wrote it"
        )
    return stored
