"""From a prepared data set to batches: texts, tokens and embeddings mapped into memory, pictures decoded when needed.

The order of training is a pure function of seed and epoch, and a batch one of the number of its step, so that the
position in the data is that number: starting there gives the same batches as never having stopped, on any number of
hosts.

Memory on each host: what is mapped (the system takes it back when it needs to) is the embeddings, 2 bytes a number; the
tokens, 2 or 4 bytes each; and 16 bytes a pair. Beside it are two epochs' orders, 4 bytes a pair each, and up to 24
bytes a pair more while the next is drawn.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from clipcap_jax import pictures, progress
from clipcap_jax.config import Targets
from clipcap_jax.datasets.schema import Split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.columns import ArrayWriter, load, made_once, open_columns
from clipcap_jax.text.tokenizer import Tokenizer

# What the caption lengths of a batch are rounded up to, as every length is compiled once. Of all computed positions, at
# most 8% are padding on COCO's captions.
LENGTHS = (8, 12, 14, 16, 20, 24, 32, 48, 64, 96)

_CACHED_BYTES = 2**28  # of decoded pictures
_TOKENISED_AT_ONCE = 2000  # examples
_TOKENS_VERSION = 2  # of how a tokenizer is used: what is kept from before is not read

Batch = dict[str, np.ndarray]


class CaptionData:
    """A split, opened for a model.

    Attributes:
      name: the data set and the split, for messages.
      image_ids, image_paths, pictures, domains: one string per example, read when asked for.
      captions: a tuple of strings per example, read when asked for.
      embedding_width: E of the stored embeddings; None where the model reads pictures.
      encoder: what made the stored embeddings, if that is known.
      fingerprint: of the data set, as it was prepared.
    """

    def __init__(self, split: Split, image_size: int | None):
        """Map the texts of a split, and its embeddings; see `columns`.

        Args:
          split: from `datasets.schema.open_split`.
          image_size: side of the pictures that the model reads, in pixels; None: it reads the stored embeddings.

        Raises:
          UserError: the data set does not hold what the model reads, or its columns cannot be made.
        """
        self.name = f"{split.name}/{split.split}"
        if image_size is None and split.embedding_width is None:
            raise UserError(f'{self.name} holds no embeddings: set config.data.input to "image", with a vision tower')
        if image_size is not None and not split.has_images:
            raise UserError(f'{self.name} holds no pictures: set config.data.input to "embedding"')
        self.embedding_width = split.embedding_width if image_size is None else None
        self.encoder = split.encoder if image_size is None else None
        self.fingerprint = split.fingerprint
        self._split = split
        self._image_size = image_size
        # In training a picture comes up once for each of its captions, and in every epoch. Those of a small split, such
        # as the drawings of shapes, all stay; of a large one a few do, which costs the memory and gains little.
        cached = _CACHED_BYTES // (3 * image_size**2) if image_size else 0
        self._pixels = functools.lru_cache(cached)(self._decode)
        self._columns = columns = open_columns(split)
        self.image_ids: Sequence[str] = columns.image_ids
        self.image_paths: Sequence[str] = columns.image_paths
        self.pictures: Sequence[str] = columns.pictures
        self.domains: Sequence[str] = columns.domains
        self.captions: Sequence[tuple[str, ...]] = columns.captions
        self._embeddings = columns.embeddings if image_size is None else None

    def __len__(self) -> int:
        return len(self.image_ids)

    def inputs(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the model reads: uint8 pictures `B H W 3`, or float16 embeddings `B E`.

        Raises:
          UserError: a picture cannot be decoded; it is named.
        """
        if self._embeddings is not None:
            return np.take(self._embeddings, np.asarray(indices), axis=0)
        return np.stack([self._pixels(int(i)) for i in indices])

    def _decode(self, index: int) -> np.ndarray:
        image = self.image(index)
        assert image is not None
        assert self._image_size is not None
        try:
            return pictures.preprocess(pictures.decode(image), self._image_size)
        except UserError as error:
            raise UserError(f"{self.name}, picture {self.image_ids[index]!r}: {error}") from error

    def embedded(self, indices: np.ndarray, embeddings: Iterable[np.ndarray]) -> "CaptionData":
        """The same split, with the model's own embeddings of these examples, each `E`, in the place of the pictures."""
        rows = np.stack(list(embeddings))
        other = copy.copy(self)
        other.embedding_width = rows.shape[1]
        other._embeddings = np.full((len(self), rows.shape[1]), np.nan, rows.dtype)  # no number, where none was given
        other._embeddings[indices] = rows
        return other

    def image(self, index: int) -> bytes | None:
        """The encoded picture, where the data set holds it."""
        return self._split[int(index)].image if self._split.has_images else None

    def pairs(self, tokenizer: Tokenizer, max_tokens: int, targets: Targets = "all") -> "Pairs":
        """As `make_pairs`, but tokenised once for all runs: they are kept beside the columns.

        Raises:
          UserError: they cannot be written, or are damaged.
        """
        chosen = json.dumps([_TOKENS_VERSION, tokenizer.to_dict(), max_tokens, targets])
        name = f"{self._columns.name}-tokens-{hashlib.sha256(chosen.encode()).hexdigest()[:16]}"
        captions = self._columns.all_captions
        folder = made_once(
            name,
            self._columns.homes,
            lambda folder: _write_pairs(folder, captions, tokenizer, max_tokens, targets, f"Tokenising {self.name}"),
        )
        return _load_pairs(folder, max_tokens, self._split.start, self._split.stop)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Every (picture, caption) pair of a split.

    examples: int32 `(pairs,)`, the picture's index; lengths: int32 `(pairs,)`, the end token included; starts: int64
    `(pairs,)`, where the pair's tokens begin in `tokens`; tokens: uint16 or int32, those of all pairs one after the
    other, and last of all the end token; max_tokens: no length is above; cut: captions longer than `max_tokens`, whose
    end is missing and which do not teach an end.
    """

    examples: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    max_tokens: int
    cut: int

    def __len__(self) -> int:
        return len(self.examples)

    def padded(self, rows: np.ndarray, length: int) -> np.ndarray:
        """The tokens of some pairs, int32 `(rows, length)`, filled up with the end token."""
        columns = np.arange(length)
        real = columns < self.lengths[rows][:, None]
        return self.tokens[np.where(real, self.starts[rows][:, None] + columns, len(self.tokens) - 1)].astype(np.int32)

    def select(self, rows: np.ndarray) -> "Pairs":
        """Some of the pairs; `cut` stays that of all."""
        examples, lengths, starts = self.examples[rows], self.lengths[rows], self.starts[rows]
        return dataclasses.replace(self, examples=examples, lengths=lengths, starts=starts)

    def holding(self, token: int) -> np.ndarray:
        """The pairs whose captions hold a token, each as often as it does."""
        places = np.flatnonzero(self.tokens == token)
        pairs = np.searchsorted(self.starts + self.lengths, places, "right")
        places, pairs = places[pairs < len(self)], pairs[pairs < len(self)]
        return pairs[self.starts[pairs] <= places]  # the others are between these pairs


def make_pairs(
    captions: Sequence[tuple[str, ...]], tokenizer: Tokenizer, max_tokens: int, targets: Targets = "all"
) -> Pairs:
    """Tokenise the captions of every picture; the original's `targets` have no end token, but white space around."""
    with tempfile.TemporaryDirectory() as folder:  # whose files stay as long as they are mapped
        _write_pairs(Path(folder), captions, tokenizer, max_tokens, targets)
        return _load_pairs(Path(folder), max_tokens, 0, len(captions))


def _write_pairs(
    folder: Path,
    captions: Sequence[tuple[str, ...]],
    tokenizer: Tokenizer,
    max_tokens: int,
    targets: Targets,
    description: str = "",
) -> None:
    """Write the arrays of `Pairs` as files, and which pairs were cut; the progress has the description, if any."""
    end = [tokenizer.end_id] if targets == "all" else []
    dtypes = {"examples": np.int32, "lengths": np.int32, "starts": np.int64, "cut": np.int64}
    dtypes["tokens"] = np.uint16 if tokenizer.size <= 2**16 else np.int32
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(ArrayWriter(folder / f"{name}.npy", dtype)) for name, dtype in dtypes.items()
        }
        bar = stack.enter_context(progress.bar(disable=not description))
        task = bar.add_task(description, total=len(captions))
        for first in range(0, len(captions), _TOKENISED_AT_ONCE):
            some = captions[first : first + _TOKENISED_AT_ONCE]
            ids = tokenizer.encode([text for texts in some for text in texts], strip=targets == "all")
            whole = np.array([len(caption) + len(end) for caption in ids], np.int64)
            lengths = np.minimum(whole, max_tokens)
            files["examples"].extend(np.repeat(np.arange(first, first + len(some)), [len(texts) for texts in some]))
            files["cut"].extend(files["lengths"].count + np.flatnonzero(whole > max_tokens))
            files["starts"].extend(files["tokens"].count + np.cumsum(lengths) - lengths)
            files["lengths"].extend(lengths)
            files["tokens"].extend([token for caption in ids for token in (caption + end)[:max_tokens]])
            bar.advance(task, len(some))
        files["tokens"].extend([tokenizer.end_id])


def _load_pairs(folder: Path, max_tokens: int, start: int, stop: int) -> Pairs:
    """The pairs of the examples from `start` to `stop`."""
    examples, lengths, starts, tokens, cut = load(folder, "examples", "lengths", "starts", "tokens", "cut")
    first, last = np.searchsorted(examples, [start, stop])
    examples = examples[first:last]
    return Pairs(
        examples=examples - np.int32(start) if start else examples,  # not a copy of a whole split
        lengths=lengths[first:last],
        starts=starts[first:last],
        tokens=tokens,
        max_tokens=max_tokens,
        cut=int(np.diff(np.searchsorted(cut, [first, last]))[0]),
    )


def training_order(lengths: np.ndarray, batch_size: int, pool_batches: int, seed: int, epoch: int) -> np.ndarray:
    """The pairs of an epoch's batches, int32 `(batches, batch_size)`; -1 where the last batch does not fill.

    Pairs are shuffled, cut into pools of `pool_batches` batches, sorted by length within each pool, cut into batches,
    and the batches are shuffled: batches hold captions of about one length, which differ from epoch to epoch.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(np.arange(len(lengths), dtype=np.int32))
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1, np.int32)])
    if pool_batches > 1:
        keys = np.where(order < 0, 0, lengths[order])
        pool = pool_batches * batch_size
        pooled = len(order) - len(order) % pool
        sort = functools.partial(np.argsort, axis=1, kind="stable")
        places = sort(keys[:pooled].reshape(-1, pool))
        order[:pooled] = np.take_along_axis(order[:pooled].reshape(-1, pool), places, axis=1).ravel()
        order[pooled:] = order[pooled:][np.argsort(keys[pooled:], kind="stable")]  # the last pool may be smaller
    return random.permutation(order.reshape(-1, batch_size))


def make_batch(
    data: CaptionData,
    pairs: Pairs,
    rows: np.ndarray,
    examples: np.ndarray | None = None,
    *,
    host: int = 0,
    hosts: int = 1,
) -> Batch:
    """The batch of the given pairs; -1 stands for a row that only fills the batch, with length 0.

    Args:
      data, pairs: the split.
      rows: int `(batch_size,)`.
      examples: the pictures to show instead of the pairs' own, int `(batch_size,)`.
      host, hosts: give only this host's share, the `host`-th of `hosts` equal blocks of rows; the tokens are filled up
        to the longest caption of the whole batch, so that all hosts' have one shape.

    Returns:
      inputs, as `CaptionData.inputs`; tokens, int32 `B T`, T the longest length, rounded up; lengths, int32 `B`.
    """
    filled = np.maximum(rows, 0)
    lengths = np.where(rows < 0, 0, pairs.lengths[filled]).astype(np.int32)
    longest = _padded(int(np.max(lengths)), pairs.max_tokens)
    examples = pairs.examples[filled] if examples is None else examples
    share = np.s_[host * len(rows) // hosts : (host + 1) * len(rows) // hosts]
    return {
        "inputs": data.inputs(examples[share]),
        "tokens": pairs.padded(filled[share], longest),
        "lengths": lengths[share],
    }


def _padded(longest: int, limit: int) -> int:
    return next((length for length in LENGTHS if longest <= length <= limit), limit)


def coming_lengths(
    pairs: Pairs, *, batch_size: int, pool_batches: int, seed: int, steps: int, start: int = 0
) -> list[int]:
    """To how many tokens the batches of the epoch under way are filled up from the step `start` on, the next first.

    See `training_batches` for what it takes.
    """
    epoch, done = divmod(start, steps_per_epoch(len(pairs), batch_size))
    order = training_order(pairs.lengths, batch_size, pool_batches, seed, epoch)[done:][: steps - start]
    longest = np.where(order < 0, 0, pairs.lengths[order]).max(axis=1)
    return list(dict.fromkeys(_padded(length, pairs.max_tokens) for length in longest.tolist()))


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Batches that hold every pair once, the last perhaps not full."""
    return -(-pairs // batch_size)


def training_batches(
    data: CaptionData,
    pairs: Pairs,
    *,
    batch_size: int,
    pool_batches: int,
    seed: int,
    steps: int,
    workers: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch]:
    """The batches of the steps `start` to `steps`, read ahead by `workers` threads, which end when it is closed.

    Of each batch a host reads its own share (see `make_batch`); put together, the hosts' are what one host would read.
    A batch depends on the number of its step alone: a run that has taken `start` steps goes on with the next batch,
    whatever the number of hosts or workers is now.

    Args:
      data, pairs: the split.
      batch_size: pairs in a step, over all hosts; a multiple of `hosts`.
      pool_batches, seed: as `training_order` takes them.
      steps: of the whole run.
      workers: threads; 0: none, batches are made when asked for.
      start: steps already taken.
      host, hosts: which of how many hosts this is.
    """
    per_epoch = steps_per_epoch(len(pairs), batch_size)
    first = start // per_epoch
    orders = pictures.load_ahead(
        functools.partial(training_order, pairs.lengths, batch_size, pool_batches, seed),
        range(first, -(-steps // per_epoch)),
        workers=min(workers, 1),
        ahead=1,  # an epoch's order is drawn while the epoch before is read: seconds, for millions of pairs
    )
    with contextlib.closing(orders):
        rows = itertools.chain.from_iterable(orders)
        yield from pictures.load_ahead(
            functools.partial(make_batch, data, pairs, host=host, hosts=hosts),
            itertools.islice(rows, start - first * per_epoch, steps - first * per_epoch),
            workers=workers,
            ahead=2 * workers,
        )


def validation_batches(
    data: CaptionData, pairs: Pairs, batch_size: int, *, permuted: bool = False, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """Every pair once, shortest captions first; the last batch is filled up with rows of length 0.

    A host gets its own share of each batch, as of `make_batch`.

    With `permuted`, every caption is shown with another picture, always the same: a model that reads its pictures has
    a clearly higher loss then. A picture is read for each of its captions: see `CaptionData.embedded`.
    """
    order = np.argsort(pairs.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    for rows in order.reshape(-1, batch_size):
        examples = pairs.examples[np.maximum(rows, 0)]
        if permuted:
            examples = other_pictures(examples, data)
        yield make_batch(data, pairs, rows, examples, host=host, hosts=hosts)


def other_pictures(examples: np.ndarray, data: CaptionData) -> np.ndarray:
    """Those that permuted validation shows with the captions of `examples`."""
    return (examples + len(data) // 2) % len(data)


def input_batches(
    data: CaptionData, indices: np.ndarray, batch_size: int, workers: int = 0, *, host: int = 0, hosts: int = 1
) -> Generator[tuple[int, np.ndarray]]:
    """The inputs of the given examples in order, as (real rows, batch); the last batch is filled up to its size.

    They are read by `workers` threads, up to two batches ahead; 0: when asked for. A host reads its own share of each
    batch: the `host`-th of `hosts` equal blocks of rows; what is real is counted over all hosts.
    """
    size = batch_size // hosts
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    # Of the last batch a host may have no real row: it takes any, as something has to fill its share.
    shares = [batch[host * size : (host + 1) * size] if len(batch) > host * size else batch[:1] for batch in batches]
    with contextlib.closing(
        pictures.load_ahead(
            lambda i: data.inputs([i])[0], itertools.chain.from_iterable(shares), workers=workers, ahead=2 * size
        )
    ) as inputs:
        for batch, share in zip(batches, shares, strict=True):
            yield len(batch), fill(np.stack(list(itertools.islice(inputs, len(share)))), size)


def fill(rows: np.ndarray, count: int) -> np.ndarray:
    """As many rows as that: the first one again and again behind those given."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])
