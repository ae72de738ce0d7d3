"""What a model is worth on a few pictures, while it trains."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from clipcap_jax import cluster, parallel
from clipcap_jax.captioning.batches import BatchCaptioner, BatchEmbedder
from clipcap_jax.config import Config, Targets
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData, Pairs, other_pictures, validation_batches
from clipcap_jax.metrics import References
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training.loss import caption_loss

T = TypeVar("T")

# Fewer distinct captions than this share of the pictures: the model hardly looks at them.
COLLAPSED = 0.05


Advance = Callable[[int], None]  # is told how many more pictures, or captions, are done


def _unseen(_: int) -> None:
    """Where nobody looks at the progress."""


class LossMeter:
    """The mean loss per token over a split, on all devices."""

    def __init__(self, model: ClipCap, targets: Targets = "all"):
        def loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, batch["inputs"], batch["tokens"])
            return caption_loss(logits, batch["tokens"], batch["lengths"], targets=targets)

        self._loss = parallel.map_sum(loss, name="the validation loss of captions of this length")

    def __call__(
        self,
        params: Any,
        data: CaptionData,
        pairs: Pairs,
        batch_size: int,
        *,
        permuted: bool = False,
        advance: Advance = _unseen,
    ) -> float:
        """In nats per token; with `permuted`, every caption is shown with another picture."""
        size = parallel.round_up(batch_size)
        batches = validation_batches(
            data,
            pairs,
            size,
            permuted=permuted,
            host=cluster.index(),
            hosts=cluster.count(),
        )
        sums = []
        for number, batch in enumerate(batches):
            sums.append(jax.device_get(self._loss(params, batch)))
            advance(min(size, len(pairs) - number * size))
        loss, tokens = np.array(sums, np.float64).sum(axis=0)  # of batches 2
        return float(loss / tokens)


@dataclasses.dataclass(frozen=True)
class Validation:
    """`metrics`: loss, loss_permuted and scores by name; `captions` by image id; how many of them are `distinct`."""

    metrics: dict[str, float]
    captions: dict[str, str]

    @property
    def distinct(self) -> int:
        return len(set(self.captions.values()))

    @property
    def collapsed(self) -> bool:
        count = len(self.captions)
        return self.distinct < max(min(2, count), COLLAPSED * count)


class Validator:
    """Validates on a fixed subset of a split: `config.evaluate.images` pictures, evenly spaced.

    Attributes:
      notes: what to know before its scores are believed.
    """

    def __init__(self, model: ClipCap, tokenizer: Tokenizer, data: CaptionData, pairs: Pairs, config: Config):
        if not len(pairs):
            raise UserError(f"{data.name} holds no captions to validate on")
        self._data, self._batch_size, self._workers = data, config.evaluate.batch_size, config.data.workers
        count = min(config.evaluate.images, len(data))
        self._indices = np.linspace(0, len(data) - 1, count).round().astype(int)
        self._pairs = pairs.select(np.isin(pairs.examples, self._indices))
        self._shown = np.union1d(self._indices, other_pictures(self._pairs.examples, data))
        self._references = References(
            {data.image_ids[i]: data.captions[i] for i in self._indices}, config.evaluate.words
        )
        self.notes = self._references.notes
        self._loss = LossMeter(model, config.train.targets)
        self._embed = BatchEmbedder(model)
        self._generate = BatchCaptioner(model, tokenizer, config.evaluate.decode)

    @property
    def total(self) -> int:
        """What `advance` is told of in all: pictures to look at, captions to read twice, pictures to caption."""
        looked_at = len(self._shown) if self._data.embedding_width is None else 0
        return looked_at + 2 * len(self._pairs) + len(self._indices)

    def __call__(self, params: Any, advance: Advance = _unseen) -> Validation:
        """Loss, scores and captions with these parameters."""
        data, size = self._data, self._batch_size
        if data.embedding_width is None:
            embeddings = self._embed.all(params, data, self._shown, size, self._workers)
            data = data.embedded(self._shown, _counted(embeddings, advance))
        loss = self._loss(params, data, self._pairs, size, advance=advance)
        permuted = self._loss(params, data, self._pairs, size, permuted=True, advance=advance)
        captions = list(_counted(self._generate.all(params, data, self._indices, size), advance))
        by_id = {data.image_ids[i]: caption.text for i, caption in zip(self._indices, captions, strict=True)}
        scores = self._references.score(by_id).overall
        return Validation({"loss": loss, "loss_permuted": permuted, **scores}, by_id)


def _counted(items: Iterator[T], advance: Advance) -> Iterator[T]:
    for item in items:
        yield item
        advance(1)
