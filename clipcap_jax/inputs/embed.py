"""Every picture of a data set through a CLIP tower, once: the embeddings are a data set of their own.

Training then reads some bytes for each picture instead of decoding it and running the tower for each of its captions,
in every epoch. Splits, captions and the order of the examples are those of the data set with the pictures.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from clipcap_jax import cluster, files, parallel, pictures, progress
from clipcap_jax.config import PRESETS
from clipcap_jax.datasets import prepare, schema
from clipcap_jax.datasets.schema import Example, Split, open_builder, open_split
from clipcap_jax.datasets.shards import VERSION, Writer
from clipcap_jax.datasets.source import EMBEDDINGS_PER_SHARD, Part, Problem, Source
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import fill
from clipcap_jax.inputs.columns import open_columns
from clipcap_jax.models.clip_vit import normalize_pixels
from clipcap_jax.models.clipcap import ClipConfig, tower


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision tower that embeds pictures on this process's devices.

    Attributes:
      config: its sizes.
      params: its parameters.
      dtype: what it computes in; "float32" is exact everywhere.
    """

    config: ClipConfig
    params: Any
    dtype: str = "float32"

    @functools.cached_property
    def name(self) -> str:
        """See `encoder_name`."""
        return encoder_name(self.config, self.params)


def encoder_name(config: ClipConfig, params: Any) -> str:
    """What embeddings are told apart by: "ViT-B/32, weights 1f2e3d4c5b6a". The second is the start of a SHA-256 of the
    sizes and of the parameters' names and float32 values, whatever file they came in."""
    digest = hashlib.sha256(repr(dataclasses.astuple(config)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):  # in the order of their names
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf, np.float32).tobytes())
    names = [name for name, preset in PRESETS.items() if preset == config]
    return f"{names[0] if names else 'CLIP'}, weights {digest.hexdigest()[:12]}"


def embed(
    encoder: Encoder,
    name: str,
    output: str,
    data_dir: str,
    *,
    batch_size: int = 256,
    workers: int = 4,
    share: tuple[int, int] = (0, 1),
    max_skipped: float = 0.01,
) -> Summary | None:
    """Embed a data set's pictures, and write "embeddings/<output>" into `data_dir` unless it is there already.

    What an interrupted run finished is kept. Where the data set was prepared anew since, the embeddings are made anew,
    in place of the old ones; but not those of pictures that were embedded before. Several hosts that see the same
    `data_dir` may each do a share; the one that finds all shares finished puts them together.

    Args:
      encoder: the tower.
      name: a prepared data set that holds pictures.
      output: the new data set will be "embeddings/<output>": float16 embeddings, not normalised, no pictures.
      data_dir: the folder of prepared data sets; on gs:// there is but one share.
      batch_size: pictures a step, over this process's devices; rounded up to a multiple of them.
      workers: threads that decode pictures, ahead of the devices.
      share: this process's number, from 0, and how many there are.
      max_skipped: how many pictures that cannot be decoded to put up with, as a share of all.

    Returns:
      What was kept and skipped; None where other shares are not finished yet.

    Raises:
      UserError: the data set is not there or holds no pictures; "embeddings/<output>" was made from something else, or
        is just being made; an embedding is not finite; a file could not be read or written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", output):
        raise UserError(f"The name {output!r} must be made of letters, digits, '_', '.' and '-'.")
    splits = {split: open_split(name, split, data_dir) for split in open_builder(name, data_dir).info.splits}
    if not all(split.has_images for split in splits.values()):
        raise UserError(f"{name} holds no pictures: there is nothing to embed")
    source = _source(_Embedder(encoder, batch_size, workers, f"embeddings/{output}", data_dir), output, splits)
    write = functools.partial(_embed, source, max_skipped)
    if not files.is_remote(data_dir):
        return write(share, data_dir)
    if share != (0, 1):
        raise UserError(f"several hosts share this work on a disk that all of them see, not on {data_dir}")
    return prepare.prepare_remote(source, data_dir, functools.partial(write, share))


def _embed(source: Source, max_skipped: float, share: tuple[int, int], data_dir: str) -> Summary | None:
    if done := prepare.find_prepared(source.name, data_dir, source.origin, source.found, source.renewed):
        return done
    writer = Writer(source, data_dir)
    number, shares = share
    try:
        work = f"share{number}of{shares}"
        with writer.locked(work):
            with writer.locked(wait=True):
                writer.begin(alone=shares == 1 and not writer.is_shared(work))
            writer.clear(range(number, len(source.parts), shares))
            mine = [i for i in range(number, len(source.parts), shares) if not writer.finished(i, source.parts[i])]
            _embed_shards(writer, mine)
        with writer.locked(wait=True):
            if done := prepare.find_prepared(source.name, data_dir, source.origin, source.found, source.renewed):
                return done  # another share was the last
            shards = [shard for i, part in enumerate(source.parts) if (shard := writer.finished(i, part))]
            return prepare.finish(writer, shards, max_skipped) if len(shards) == len(source.parts) else None
    except OSError as error:
        raise UserError(f"{source.name} could not be written to {data_dir}: {error}") from error


Known = dict[str, tuple[np.ndarray, int]]  # by a picture's digest: a matrix of embeddings, and its row there


class _Embedder:
    """Embeds pictures of splits with one compiled program."""

    def __init__(self, encoder: Encoder, batch_size: int, workers: int, name: str, data_dir: str):
        self.encoder, self._workers = encoder, workers
        self._name, self._data_dir = name, data_dir
        self._batch_size = parallel.round_up(batch_size, local=True)

    @functools.cached_property
    def _known(self) -> Known:
        """The embeddings of the data set that is to be replaced; none where there is none."""
        name, data_dir = self._name, self._data_dir
        if not schema.is_finished(tfds.core.Path(data_dir).expanduser() / name / VERSION):
            return {}
        known: Known = {}
        for split in open_builder(name, data_dir).info.splits:
            columns = open_columns(open_split(name, split, data_dir))
            assert columns.embeddings is not None
            known |= {picture: (columns.embeddings, row) for row, picture in enumerate(columns.pictures)}
        return known

    @functools.cached_property  # not where all is there already
    def _begin(self) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
        encoder = self.encoder
        model = tower(encoder.config, jnp.dtype(encoder.dtype))

        def apply(params: Any, pixels: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest" if encoder.dtype == "float32" else "default"):
                return model.apply({"params": params}, normalize_pixels(pixels)).astype(jnp.float32)

        begin, params = (
            parallel.begin_rows(apply, local=True, name="the vision tower"),
            parallel.replicate(encoder.params),
        )
        return lambda pixels: begin(params, parallel.send(pixels))

    def __call__(self, split: Split, rows: range) -> Iterator[Example | Problem]:
        """A batch is handed out when the next has begun, so that the devices need not wait for the host."""
        begun: Iterator[Example] = iter(())
        batch: list[tuple[Example, np.ndarray | None]] = []
        count = 0
        load = functools.partial(self._load, self._known, split)
        for item in pictures.load_ahead(load, rows, workers=self._workers, ahead=2 * self._batch_size):
            if isinstance(item, Problem):
                yield item
                continue
            batch.append(item)
            count += item[1] is not None
            if count == self._batch_size:
                before, begun, batch, count = begun, self._embedded(batch), [], 0
                yield from before
        last = self._embedded(batch) if batch else iter(())
        yield from begun
        yield from last

    def _load(self, known: Known, split: Split, index: int) -> tuple[Example, np.ndarray | None] | Problem:
        """An example without its picture, and that in pixels; or with its embedding, where that is known."""
        example = split[index]
        assert example.image is not None
        image, example = example.image, dataclasses.replace(example, image=None, embedding=None)
        if example.picture in known:
            embeddings, row = known[example.picture]
            return dataclasses.replace(example, embedding=embeddings[row]), None
        try:
            pixels = pictures.preprocess(pictures.decode(image), self.encoder.config.image_size)
        except UserError as error:
            return Problem(f"{split.name}/{split.split}", "image broken", f"{example.image_id}: {error}")
        return example, pixels

    def _embedded(self, batch: list[tuple[Example, np.ndarray | None]]) -> Iterator[Example]:
        new = [pixels for _, pixels in batch if pixels is not None]
        wait = self._begin(fill(np.stack(new), self._batch_size)) if new else None  # one shape
        return _finished([example for example, _ in batch], wait)


def _finished(batch: list[Example], wait: Callable[[], np.ndarray] | None) -> Iterator[Example]:
    made = iter(() if wait is None else wait().astype(np.float16))
    for example in batch:
        embedding = next(made) if example.embedding is None else example.embedding
        if not np.isfinite(embedding).all():
            raise UserError(f"the embedding of {example.image_id} is not finite: the tower's weights are broken")
        yield dataclasses.replace(example, embedding=embedding)


def _source(embedder: _Embedder, output: str, splits: dict[str, Split]) -> Source:
    first = next(iter(splits.values()))
    encoder = embedder.encoder
    size = encoder.config.image_size
    made = {
        "encoder": encoder.name,
        "dtype": encoder.dtype,
        "preprocessing": f"short side to {size} pixels (bicubic), {size} x {size} from the middle",
        "normalized": False,
    }
    return Source(
        name=f"embeddings/{output}",
        origin={"data": first.name, "fingerprint": first.fingerprint, **made},
        renewed=["fingerprint"],
        parts=[
            Part(split, functools.partial(embedder, held, rows), len(rows))
            for split, held in splits.items()
            for start in range(0, len(held), EMBEDDINGS_PER_SHARD)
            for rows in [range(start, min(start + EMBEDDINGS_PER_SHARD, len(held)))]
        ],
        found={"data": first.name, **made},
        root=first.root,
        has_images=False,
        embedding_width=encoder.config.embedding_width,
        encoder=encoder.name,
        description=f"CLIP embeddings of {first.name}.",
        metadata={"embeddings": made},
    )


def _embed_shards(writer: Writer, indices: list[int]) -> None:
    """The shards of these parts, one after the other."""
    parts = [writer.source.parts[index] for index in indices]
    with progress.bar(disable=not cluster.is_main()) as bar:
        task = bar.add_task(f"Embedding {writer.source.name}", total=sum(part.count for part in parts))

        def counted(part: Part) -> Iterator[Example | Problem]:
            for example in part.read():
                bar.advance(task)
                yield example

        for index, part in zip(indices, parts, strict=True):
            writer.write(index, dataclasses.replace(part, read=functools.partial(counted, part)))
