"""What a model makes of a picture before it writes, and how likely it has the captions of others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import parallel
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import fill
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer

_MULTIPLE = 8  # of tokens in a batch, so that few programs are compiled
_SHOWN = 60  # characters of a caption in a message


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a caption of a picture is; `log_likelihood`: nats, summed over its `tokens`, its end included."""

    text: str
    log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Of a token."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.log_likelihood / self.tokens))


@dataclasses.dataclass(frozen=True)
class Word:
    """A piece of the vocabulary, with its space; `similarity`: its embedding's cosine with a vector of a prefix."""

    text: str
    similarity: float


def nearest(prefix: np.ndarray, table: np.ndarray, tokenizer: Tokenizer, count: int) -> list[list[Word]]:
    """For each vector of a prefix, float32 `P D`, the `count` pieces nearest to it in GPT-2's table `V D`, from the
    nearest on."""
    table = table[: tokenizer.size]  # there may be rows that no piece has
    similarities = _unit(prefix) @ _unit(table).T  # P V
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    return [
        [Word(tokenizer.piece(token), float(row[token])) for token in tokens]
        for row, tokens in zip(similarities, best.tolist(), strict=True)
    ]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _short(caption: str) -> str:
    return repr(caption) if len(caption) <= _SHOWN else f"{caption[:_SHOWN]!r}..."


def _is_utf8(caption: str) -> bool:
    return caption.encode(errors="ignore").decode() == caption


class BatchScorer:
    """Scores captions of one picture in batches, on all devices."""

    def __init__(self, model: ClipCap, tokenizer: Tokenizer, decode: DecodeConfig, *, local: bool = False):
        """`local`: on this process's devices alone."""
        stop = tokenizer.stop_id(decode.stop)
        self._tokenizer, self._end = tokenizer, [stop] if stop == tokenizer.end_id else []
        self._most = model.config.gpt2.positions - model.config.mapper.prefix_length
        self._local = local

        def score(constants: tuple[Any, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            (params, embedding), (tokens, lengths) = constants, batch
            embeddings = jnp.broadcast_to(embedding, (len(tokens), *embedding.shape))
            logits = model.apply({"params": params}, embeddings, tokens)  # B T V
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]  # B T
            real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            return jnp.where(real, log_probs, 0.0).sum(axis=1)

        self._score = parallel.map_rows(score, local=local, name="the likelihood of captions")

    def __call__(
        self, params: Any, embedding: np.ndarray, captions: Sequence[str], batch_size: int
    ) -> list[Likelihood]:
        """Score captions of the picture with this embedding, float32 `E`.

        Raises:
          UserError: a caption has no tokens, or more than GPT-2 can read.
        """
        if odd := [caption for caption in captions if not _is_utf8(caption)]:
            raise UserError(f"{_short(odd[0])} is no text: it has halves of characters")
        ids = [tokens + self._end for tokens in self._tokenizer.encode(captions)]
        for caption, tokens in zip(captions, ids, strict=True):
            if not 0 < len(tokens) <= self._most:
                raise UserError(f"{_short(caption)} has {len(tokens)} tokens: this model scores 1 to {self._most}")
        lengths = np.array([len(tokens) for tokens in ids], np.int32)
        longest = -(-max(map(len, ids), default=0) // _MULTIPLE) * _MULTIPLE
        matrix = np.zeros((len(ids), min(longest, self._most)), np.int32)
        for row, tokens in zip(matrix, ids, strict=True):
            row[: len(tokens)] = tokens
        size = parallel.round_up(min(batch_size, len(ids) or 1), local=self._local)
        found: list[Likelihood] = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            batch = fill(matrix[rows], size), fill(lengths[rows], size)
            scores = self._score((params, embedding), batch)
            found += map(Likelihood, captions[rows], scores.tolist(), lengths[rows].tolist())
        return found
