"""From a prepared data set to batches: texts and embeddings in memory, pictures decoded when they are first needed.

The order of training is a pure function of seed and epoch, and a batch one of its number, so that the position in the
data is that number: Grain keeps it, and continuing from it gives the same batches as never having stopped.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from clipcap_jax import images
from clipcap_jax.datasets.schema import Split
from clipcap_jax.errors import UserError
from clipcap_jax.loss import Targets
from clipcap_jax.tokenizer import Tokenizer

# What the caption lengths of a batch are rounded up to, as every length is compiled once.
LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96)

_CACHED_BYTES = 2**28  # of decoded pictures

Batch = dict[str, np.ndarray]


class CaptionData:
    """A split, opened for a model.

    Attributes:
      name: the data set and the split, for messages.
      image_ids, image_paths, domains: one string per example.
      captions: a tuple of strings per example.
      embedding_width: E of the stored embeddings; None where the model reads pictures.
      encoder: what made the stored embeddings, if that is known.
    """

    def __init__(self, split: Split, image_size: int | None):
        """Read the texts of a split, and its embeddings.

        Args:
          split: from `datasets.schema.open_split`.
          image_size: side of the pictures that the model reads, in pixels; None: it reads the stored embeddings.

        Raises:
          UserError: the data set does not hold what the model reads.
        """
        self.name = f"{split.name}/{split.split}"
        if image_size is None and split.embedding_width is None:
            raise UserError(f'{self.name} holds no embeddings: set config.data.input to "image", with a vision tower')
        if image_size is not None and not split.has_images:
            raise UserError(f'{self.name} holds no pictures: set config.data.input to "embedding"')
        self.embedding_width = split.embedding_width if image_size is None else None
        self.encoder = split.encoder if image_size is None else None
        self._split = split
        self._image_size = image_size
        # A picture comes up once for each of its captions, and in every epoch.
        cached = _CACHED_BYTES // (3 * image_size**2) if image_size else 0
        self._pixels = functools.lru_cache(cached)(self._decode)
        examples = list(_without_images(split))
        self.image_ids = [example.image_id for example in examples]
        self.image_paths = [example.image_path for example in examples]
        self.domains = [example.domain for example in examples]
        self.captions = [example.captions for example in examples]
        self._embeddings = None if image_size is not None else np.stack([example.embedding for example in examples])

    def __len__(self) -> int:
        return len(self.image_ids)

    def inputs(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the model reads: uint8 pictures `B H W 3`, or float16 embeddings `B E`.

        Raises:
          UserError: a picture cannot be decoded; it is named.
        """
        if self._embeddings is not None:
            return self._embeddings[np.asarray(indices)]
        return np.stack([self._pixels(int(i)) for i in indices])

    def _decode(self, index: int) -> np.ndarray:
        image = self.image(index)
        assert image is not None
        assert self._image_size is not None
        try:
            return images.preprocess(images.decode(image), self._image_size)
        except UserError as error:
            raise UserError(f"{self.name}, picture {self.image_ids[index]!r}: {error}") from error

    def image(self, index: int) -> bytes | None:
        """The encoded picture, where the data set holds it."""
        return self._split[int(index)].image


def _without_images(split: Split) -> Iterator[Any]:
    for example in split:
        yield dataclasses.replace(example, image=None)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Every (picture, caption) pair of a split.

    examples: int32 `(pairs,)`, the picture's index; tokens: int32 `(pairs, max_tokens)`, filled up with the end token;
    lengths: int32 `(pairs,)`, the end token included; cut: captions longer than `max_tokens`, whose end is missing and
    which do not teach an end.
    """

    examples: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.examples)


def make_pairs(
    captions: Sequence[tuple[str, ...]], tokenizer: Tokenizer, max_tokens: int, targets: Targets = "all"
) -> Pairs:
    """Tokenise the captions of every picture; the original's `targets` have no end token, but white space around."""
    examples = np.repeat(np.arange(len(captions), dtype=np.int32), [len(texts) for texts in captions])
    end = [tokenizer.end_id] if targets == "all" else []
    flat = [text for texts in captions for text in texts]
    ids = [ids + end for ids in tokenizer.encode(flat, strip=targets == "all")]
    tokens = np.full((len(ids), max_tokens), tokenizer.end_id, np.int32)
    for row, caption in zip(tokens, ids, strict=True):
        row[: len(caption)] = caption[:max_tokens]
    lengths = np.array([len(caption) for caption in ids], np.int32)
    return Pairs(examples, tokens, np.minimum(lengths, max_tokens), cut=int((lengths > max_tokens).sum()))


def training_order(lengths: np.ndarray, batch_size: int, pool_batches: int, seed: int, epoch: int) -> np.ndarray:
    """The pairs of an epoch's batches, int64 `(batches, batch_size)`; -1 where the last batch does not fill.

    Pairs are shuffled, cut into pools of `pool_batches` batches, sorted by length within each pool, cut into batches,
    and the batches are shuffled: batches hold captions of about one length, which differ from epoch to epoch.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    pool = pool_batches * batch_size
    if pool_batches > 1:
        keys = np.where(order < 0, 0, lengths[order])
        order = np.concatenate(
            [order[i : i + pool][np.argsort(keys[i : i + pool], kind="stable")] for i in range(0, len(order), pool)]
        )
    return random.permutation(order.reshape(-1, batch_size))


def make_batch(data: CaptionData, pairs: Pairs, rows: np.ndarray, examples: np.ndarray | None = None) -> Batch:
    """The batch of the given pairs; -1 stands for a row that only fills the batch, with length 0.

    Args:
      data, pairs: the split.
      rows: int `(batch_size,)`.
      examples: the pictures to show instead of the pairs' own, int `(batch_size,)`.

    Returns:
      inputs, as `CaptionData.inputs`; tokens, int32 `B T`, T the longest length, rounded up; lengths, int32 `B`.
    """
    filled = np.maximum(rows, 0)
    lengths = np.where(rows < 0, 0, pairs.lengths[filled]).astype(np.int32)
    max_tokens = pairs.tokens.shape[1]
    longest = next((length for length in LENGTHS if np.max(lengths) <= length <= max_tokens), max_tokens)
    examples = pairs.examples[filled] if examples is None else examples
    return {"inputs": data.inputs(examples), "tokens": pairs.tokens[filled, :longest], "lengths": lengths}


class _TrainingBatches:
    """Batch number -> batch, for all epochs: what Grain iterates over."""

    def __init__(self, data: CaptionData, pairs: Pairs, batch_size: int, pool_batches: int, seed: int, steps: int):
        self._data, self._pairs, self._steps = data, pairs, steps
        self._per_epoch = steps_per_epoch(len(pairs), batch_size)

        # Two: around an epoch's end, threads that read ahead need both.
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return training_order(pairs.lengths, batch_size, pool_batches, seed, epoch)

        self._order = order

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self._per_epoch)
        return make_batch(self._data, self._pairs, self._order(epoch)[batch])


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Batches that hold every pair once, the last perhaps not full."""
    return -(-pairs // batch_size)


def training_batches(
    data: CaptionData, pairs: Pairs, *, batch_size: int, pool_batches: int, seed: int, steps: int, workers: int
) -> grain.DatasetIterator:
    """An iterator over `steps` training batches, read ahead by `workers` threads; it has Grain's get and set_state."""
    source = _TrainingBatches(data, pairs, batch_size, pool_batches, seed, steps)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def validation_batches(data: CaptionData, pairs: Pairs, batch_size: int, *, permuted: bool = False) -> Iterator[Batch]:
    """Every pair once, shortest captions first; the last batch is filled up with rows of length 0.

    With `permuted`, every caption is shown with another picture, always the same: a model that reads its pictures has
    a clearly higher loss then.
    """
    order = np.argsort(pairs.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    for rows in order.reshape(-1, batch_size):
        examples = pairs.examples[np.maximum(rows, 0)]
        if permuted:
            examples = (examples + len(data) // 2) % len(data)
        yield make_batch(data, pairs, rows, examples)


def input_batches(data: CaptionData, indices: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The inputs of the given examples in order, as (real rows, batch); the last batch is filled up to its size."""
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0], rows.dtype)])
        yield len(rows), data.inputs(filled)
