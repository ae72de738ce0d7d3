"""What training and evaluation compute, by its definition: a caption at a time, in float64."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clipcap_jax.config import Config, Targets
from clipcap_jax.datasets.schema import Split
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer


def taught(text: str, tokenizer: Tokenizer, max_tokens: int, targets: Targets) -> list[int]:
    """The ids of a caption, with an end token unless the targets are the original's."""
    [ids] = tokenizer.encode([text])
    return [*ids, *([tokenizer.end_id] if targets == "all" else [])][:max_tokens]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: ClipCap, params: Any, embedding: np.ndarray, tokens: np.ndarray) -> jax.Array:
    return model.apply({"params": params}, embedding, tokens)


def mean_loss(
    config: Config, params: Any, tokenizer: Tokenizer, split: Split, shown: Mapping[int, int] | None = None
) -> float:
    """Of the captions of some pictures, each shown with a picture, in nats per token; None: of all, with their own."""
    max_tokens, targets = config.data.max_tokens, config.train.targets
    losses: list[float] = []
    for picture, other in (shown or {i: i for i in range(len(split))}).items():
        for text in split[picture].captions:
            ids = taught(text, tokenizer, max_tokens, targets)
            padded = np.array([ids + [0] * (max_tokens - len(ids))], np.int32)
            embedding = np.asarray(split[other].embedding)[None]
            scores = np.asarray(_logits(ClipCap(config.model), params, embedding, padded), np.float64)[0]
            log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
            losses += [-log_probs[t, token] for t, token in enumerate(ids) if token or targets == "all"]
    return float(np.mean(losses))


def tokenizer_with_a_word_at_0(captions: list[str], size: int) -> Tokenizer:
    """As GPT-2 has "!" there, which the original's targets leave out; one that is trained has the end of text there."""
    stored = Tokenizer.train(captions, size).to_dict()
    content = json.loads(stored["tokenizer_json"])
    vocabulary, end = content["model"]["vocab"], stored["end_token"]
    vocabulary[end], vocabulary["Ġa"] = vocabulary["Ġa"], vocabulary[end]
    content["added_tokens"][0]["id"] = vocabulary[end]
    tokenizer = Tokenizer.from_dict({**stored, "tokenizer_json": json.dumps(content)})
    assert tokenizer.end_id
    assert any(0 in ids for ids in tokenizer.encode(captions))
    return tokenizer
