"""From a checkpoint to captions."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipcap_jax import cluster, parallel, pictures
from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData, fill, input_batches
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.progress import screen
from clipcap_jax.text.tokenizer import Tokenizer

_CHECKED_AT_ONCE = 65536  # rows of a matrix, which may be larger than the memory


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption; `finished` is false where the length limit cut it; `score` ranks it (see `decode.DecodeConfig`)."""

    text: str
    finished: bool
    score: float


class BatchEmbedder:
    """Lets a model's vision tower look at pictures on all devices, with whatever parameters it is given.

    The rest of the model does with an embedding what it would do with the picture. So whoever needs a picture more than
    once, to caption it and for each of its references, has it decoded and looked at once.
    """

    def __init__(self, model: ClipCap):
        self._embed = parallel.map_rows(lambda params, images: model.apply({"params": params}, images, method="embed"))

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

        def best(params: Any, inputs: jax.Array) -> Hypotheses:
            found = beam_search(model, params, inputs, decode, tokenizer.stop_id(decode.stop))
            return jax.tree.map(lambda x: x[:, 0], found)

        self._best = parallel.map_rows(best, local=local)

    def __call__(self, params: Any, inputs: np.ndarray) -> list[Caption]:
        """Caption one batch: a process gives its share of the rows, as many for each device, and gets all captions."""
        found = self._best(params, inputs)
        return [
            Caption(self._tokenizer.decode(tokens[:length]), bool(finished), float(score))
            for tokens, length, score, finished in zip(*found, strict=True)
        ]

    def all(self, params: Any, data: CaptionData, indices: np.ndarray, batch_size: int) -> Iterator[Caption]:
        """Caption the given examples, in order, each once."""
        for rows, inputs in _batches(data, indices, batch_size):
            yield from self(params, inputs)[:rows]


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


class Captioner:
    """A trained model, ready to caption.

    Where there are several processes, they caption a split together, with `generate` and `embed`; or each captions by
    itself what it is given, with `caption` and `caption_files` of a captioner that was made with `local`.

    Attributes:
      metadata: what the checkpoint says about the model.
      model, params: the model.
      step: the checkpoint's.
    """

    def __init__(
        self,
        metadata: Metadata,
        params: Any,
        step: int,
        decode: DecodeConfig | None = None,
        *,
        local: bool = False,
    ):
        self.metadata = metadata
        self.step = step
        self.model = ClipCap(metadata.config.model)
        self.params = parallel.replicate(params)
        self.decode = decode or metadata.config.evaluate.decode
        self._local = local
        self.generate = BatchCaptioner(self.model, metadata.tokenizer, self.decode, local=local)
        self.embed = BatchEmbedder(self.model)

    @classmethod
    def load(
        cls, run: str | Path, which: str = "best", decode: DecodeConfig | None = None, *, local: bool = False
    ) -> "Captioner":
        """Load a checkpoint; where the best or latest one is damaged, the newest that is not, with a warning.

        Args:
          run: the folder that training wrote to.
          which: "best" (by CIDEr on the validation subset), "latest" or a step.
          decode: how to search; None: as the run's config says.
          local: whether to use this process's devices alone.

        Raises:
          UserError: there is no such checkpoint, or this version cannot read it.
        """
        with store.opened(run) as checkpoints:
            steps = [checkpoints.find(which)]
            if not which.isdigit():
                steps += [step for step in reversed(checkpoints.steps()) if step != steps[0]]
            while True:
                step = steps.pop(0)
                try:
                    return cls(checkpoints.metadata(step), checkpoints.params(step), step, decode, local=local)
                except store.Damaged as error:
                    if not steps:
                        raise
                    told = f"Warning: {error} The one of step {steps[0]} is tried."
                    screen(stderr=True).print(told, style="yellow", soft_wrap=True)

    def with_decode(self, decode: DecodeConfig) -> "Captioner":
        """The same model, searching differently."""
        other = copy.copy(self)
        other.decode = decode
        other.generate = BatchCaptioner(self.model, self.metadata.tokenizer, decode, local=self._local)
        return other

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the pictures it reads; None: it has no vision tower and reads embeddings alone."""
        clip = self.metadata.config.model.clip
        return clip.image_size if clip else None

    def caption_files(
        self, paths: Sequence[Path], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Path, Caption | UserError]]:
        """Caption picture files, in order; of one that cannot be read comes the error instead.

        Pictures are decoded by `workers` threads, one batch ahead of the devices.

        Raises:
          UserError: this model reads no pictures; a disk does not answer (see `pictures.read`).
        """
        if self.image_size is None:
            raise self._not_pictures()
        size = self.image_size

        def load(path: Path) -> np.ndarray | UserError:
            try:
                return pictures.preprocess(pictures.decode(pictures.read(path)), size)
            except UserError as error:
                return error
            except TimeoutError as error:  # nor would any other on that disk be read
                raise UserError(str(error)) from error
            except OSError as error:
                return UserError(f"cannot be read: {error.strerror}")

        batch_size = parallel.round_up(min(batch_size, len(paths)), local=self._local)
        loaded = zip(paths, pictures.load_ahead(load, paths, workers=workers, ahead=batch_size), strict=True)
        while batch := list(itertools.islice(loaded, batch_size)):
            pixels = [picture for _, picture in batch if isinstance(picture, np.ndarray)]
            captions = iter(self._caption_batch(np.stack(pixels), batch_size) if pixels else ())
            for path, picture in batch:
                yield path, picture if isinstance(picture, UserError) else next(captions)

    def caption(
        self, inputs: np.ndarray, batch_size: int = 64, batches: Iterable[range] | None = None
    ) -> Iterator[Caption]:
        """Caption preprocessed pictures, uint8 `n H W 3` (see `pictures.preprocess`), or embeddings, float `n E`.

        Args:
          inputs: all of them, which are checked before the first is captioned.
          batch_size: rows per step, rounded up to a multiple of the devices.
          batches: the rows to caption, up to a batch at a time; None: all.

        Raises:
          UserError: the inputs are not of the kind or width that the model was trained on.
        """
        if inputs.ndim == 4 and self.image_size is None:
            raise self._not_pictures()
        if inputs.ndim != 4 and self.metadata.config.data.input == "image":
            raise UserError("this checkpoint was trained on pictures and cannot caption embeddings")
        if inputs.ndim != 4:
            self._check_embeddings(inputs)
        batch_size = parallel.round_up(max(1, min(batch_size, len(inputs))), local=self._local)
        if batches is None:
            batches = (range(start, start + batch_size) for start in range(0, len(inputs), batch_size))
        for rows in batches:
            if rows:
                yield from self._caption_batch(inputs[rows.start : rows.stop], batch_size)

    def _caption_batch(self, rows: np.ndarray, batch_size: int) -> list[Caption]:
        """At most `batch_size` rows, always as that many, so that one program does for all batches."""
        return self.generate(self.params, fill(rows, batch_size))[: len(rows)]

    def _embedding_kind(self) -> str:
        encoder = self.metadata.encoder or "an encoder that it does not name"
        return f"embeddings of width {self.metadata.embedding_width} from {encoder}"

    def _not_pictures(self) -> UserError:
        return UserError(
            f"this checkpoint was trained on {self._embedding_kind()}, not on pictures: embed the pictures with that "
            "encoder and give the matrix (.npy, one row per picture)"
        )

    def _check_embeddings(self, inputs: np.ndarray) -> None:
        if inputs.dtype.kind not in "fiu" or not inputs.ndim:
            raise UserError(f"no matrix of numbers, but {inputs.dtype} of the shape {inputs.shape}")
        if inputs.shape[1:] != (self.metadata.embedding_width,):
            raise UserError(
                f"the embeddings have the shape {inputs.shape}; this checkpoint was trained on {self._embedding_kind()}"
            )
        bad: list[int] = []
        for start in range(0, len(inputs), _CHECKED_AT_ONCE):
            with np.errstate(over="ignore"):  # beyond float32
                rows = inputs[start : start + _CHECKED_AT_ONCE].astype(np.float32)
            bad.extend(start + np.flatnonzero(~np.isfinite(rows).all(axis=1) | ~rows.any(axis=1)))
        if bad:
            raise UserError(
                f"{len(bad)} embeddings are not finite in float32, or 0 everywhere, the first in row {bad[0]} (counted "
                "from 0)"
            )
