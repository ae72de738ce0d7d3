"""Batches become captions, on all devices."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from clipcap_jax import cluster, parallel
from clipcap_jax.captioning.constraints import FREE, Constraints
from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.captioning.sampling import Sampling, sample
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData, input_batches
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption; `finished` is false where the length limit cut it; `score` ranks it (see `config.DecodeConfig`)."""

    text: str
    finished: bool
    score: float

    def __str__(self) -> str:
        return self.text


def finite(captions: list[Caption], n: int | None) -> Any:
    """Of one input's, those whose score is a number; with no `n` the first of them alone. If none is, an error."""
    kept = [caption for caption in captions if math.isfinite(caption.score)]
    if not kept:
        return UserError(
            "no caption has a finite score: the weights or the embedding lead beyond the numbers, or what is asked of "
            "captions leaves none"
        )
    return kept[0] if n is None else kept


def _captions(tokenizer: Tokenizer, found: Any, count: int, constraints: Constraints) -> list[list[Caption]]:
    """Of each row of `Hypotheses` that are on the host, the first `count`, after the prompt."""
    prompt = () if constraints.prompt is None else constraints.prompt
    return [
        [
            Caption(tokenizer.decode([*prompt, *tokens[:length]]), bool(finished), float(score))
            for tokens, length, score, finished in itertools.islice(zip(*row, strict=True), count)
        ]
        for row in zip(*found, strict=True)
    ]


class BatchEmbedder:
    """Lets a model's vision tower look at pictures on all devices, with whatever parameters it is given.

    The rest of the model does with an embedding what it would do with the picture. So whoever needs a picture more than
    once, to caption it and for each of its references, has it decoded and looked at once.
    """

    def __init__(self, model: ClipCap):
        def embed(params: Any, images: jax.Array) -> jax.Array:
            embeddings: jax.Array = model.apply({"params": params}, images, method="embed")
            return embeddings

        self._embed = parallel.map_rows(embed, name="the vision tower")

    def all(
        self, params: Any, data: CaptionData, indices: np.ndarray, batch_size: int, workers: int
    ) -> Iterator[np.ndarray]:
        """Embed the given examples, in order, each once; `workers` threads decode ahead of the devices."""
        for rows, images in _batches(data, indices, batch_size, workers):
            yield from self._embed(params, images)[:rows]


class BatchCaptioner:
    """Captions batches on all devices, with whatever parameters it is given."""

    def __init__(self, model: ClipCap, tokenizer: Tokenizer, decode: DecodeConfig, *, local: bool = False):
        """`local`: on this process's devices alone."""
        self._tokenizer = tokenizer

        def search(constants: tuple[Any, Constraints], inputs: jax.Array) -> Hypotheses:
            params, constraints = constants
            return beam_search(model, params, inputs, decode, tokenizer.stop_id(decode.stop), constraints)

        self._search = parallel.map_rows(search, local=local, name="the search for captions")

    def __call__(self, params: Any, inputs: np.ndarray) -> list[Caption]:
        """Caption one batch: a process gives its share of the rows, as many for each device, and gets all captions."""
        return [best for [best] in self.best(params, inputs, 1)]

    def best(self, params: Any, inputs: np.ndarray, count: int, constraints: Constraints = FREE) -> list[list[Caption]]:
        """As a call, but the best `count` of the beam, best first, and as constrained."""
        return _captions(self._tokenizer, self._search((params, constraints), inputs), count, constraints)

    def all(self, params: Any, data: CaptionData, indices: np.ndarray, batch_size: int) -> Iterator[Caption]:
        """Caption the given examples, in order, each once."""
        for rows, inputs in _batches(data, indices, batch_size):
            yield from self(params, inputs)[:rows]


class BatchSampler:
    """Draws captions of batches on all devices; `decode.beam_size` of each picture."""

    def __init__(self, model: ClipCap, tokenizer: Tokenizer, decode: DecodeConfig, *, local: bool = False):
        """`local`: on this process's devices alone."""
        self._tokenizer, self._draws = tokenizer, decode.beam_size

        def draw(constants: tuple[Any, Any, Sampling, Constraints], batch: tuple[jax.Array, jax.Array]) -> Hypotheses:
            params, seed, sampling, constraints = constants
            key, end_token = jax.random.key(seed), tokenizer.stop_id(decode.stop)
            return sample(model, params, *batch, key, decode, sampling, self._draws, end_token, constraints)

        self._draw = parallel.map_rows(draw, local=local, name="the drawing of captions")

    def __call__(
        self,
        params: Any,
        inputs: np.ndarray,
        rows: np.ndarray,
        seed: int,
        sampling: Sampling,
        constraints: Constraints = FREE,
    ) -> list[list[Caption]]:
        """Caption one batch, whose rows have the numbers `rows`, uint32 `B`."""
        found = self._draw((params, np.uint32(seed), sampling, constraints), (inputs, rows))
        return _captions(self._tokenizer, found, self._draws, constraints)


def _batches(data: CaptionData, indices: np.ndarray, batch_size: int, workers: int = 0) -> Iterator[tuple[int, Any]]:
    """As `input_batches`, each process its share."""
    return input_batches(
        data,
        indices,
        parallel.round_up(min(batch_size, len(indices))),
        workers,
        host=cluster.index(),
        hosts=cluster.count(),
    )
