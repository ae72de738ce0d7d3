"""From a checkpoint to captions."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from clipcap_jax import files, hub, parallel, pictures
from clipcap_jax.captioning.batches import BatchCaptioner, BatchEmbedder, BatchSampler, Caption
from clipcap_jax.captioning.inputs import Hopeless, InputReader, is_one, name_of
from clipcap_jax.captioning.settings import Settings, check_count, settings
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import DecodeConfig
from clipcap_jax.convert.assemble import open_original
from clipcap_jax.convert.package import open_hub
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import fill
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.progress import screen

__all__ = ["Caption", "Captioner"]


class Captioner:
    """A trained model, ready to caption.

    Where there are several processes, they caption a split together, with `generate` and `embed`; or each captions by
    itself what it is given, with `caption` of a captioner that was made with `local`.

    Attributes:
      metadata: what the checkpoint says about the model.
      model, params: the model.
      step: the checkpoint's.
      decode: how it searches unless told otherwise.
      reader: what it can read.
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
        self.reader = InputReader(metadata)
        self._local = local
        self._programs: dict[Any, Any] = {}  # by what they do: they take long to compile
        self.generate: BatchCaptioner = self._program(BatchCaptioner, self.decode)
        self.embed = BatchEmbedder(self.model)

    def __repr__(self) -> str:
        reads = [f"pictures of {self.image_size} x {self.image_size}"] * (self.image_size is not None)
        reads += [self.reader.embedding_kind()] * self.reader.takes_embeddings
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"<Captioner of {' or '.join(reads)}: {self.metadata.config.model.mapper.kind} mapper, {count:,} "
            f"parameters, step {self.step}>"
        )

    @classmethod
    def load(
        cls,
        run: str | Path,
        checkpoint: str | int = "best",
        decode: DecodeConfig | None = None,
        *,
        local: bool = False,
        **original: Any,
    ) -> "Captioner":
        """Load a checkpoint; where the best or latest one is damaged, the newest that is not, with a warning.

        Args:
          run: the folder that training wrote to; the original's `.pt` file; or, as a text, a repository that `clipcap
            push` wrote on the Hugging Face hub, "user/name" or "user/name@REVISION", where nothing here has that name.
          checkpoint: "best" (by CIDEr on the validation subset), "latest" or a step.
          decode: how to search; None: as the run's config says.
          local: whether to use this process's devices alone.
          **original: `published`, `clip`, `normalize`, `tokenizer`, `mapper_heads`, `gpt2_heads` and `clip_heads`: what
            the original's file does not say about itself (see `convert.assemble.open_original`).

        Raises:
          UserError: there is no such checkpoint, or this version cannot read it; the hub does not give it.
        """
        if not files.is_remote(run) and files.place(run).is_file():
            return cls(*open_original(files.place(run), **original), step=0, decode=decode, local=local)
        if original:
            raise UserError(f"{', '.join(original)}: for the original's .pt files alone, and {run} is none")
        checkpoint = str(checkpoint)
        if isinstance(run, str) and hub.is_name(run) and not files.place(run).exists():
            if checkpoint != "best":
                raise UserError(f"{run} is on the Hugging Face hub, which has one checkpoint: name a {run}@REVISION")
            return cls(*open_hub(run), step=0, decode=decode, local=local)
        with _without_warnings(), store.opened(run) as checkpoints:
            steps = [checkpoints.find(checkpoint)]
            if not checkpoint.isdigit():
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
        """The same model, searching differently unless told otherwise."""
        other = copy.copy(self)
        other.decode = decode
        other.generate = self._program(BatchCaptioner, decode)
        return other

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the pictures it reads; None: it has no vision tower and reads embeddings alone."""
        return self.reader.image_size

    def caption(
        self,
        inputs: Any,
        *,
        n: int | None = None,
        errors: Literal["raise", "return"] = "raise",
        stream: bool = False,
        batch_size: int = 64,
        workers: int = 4,
        beam_size: int | None = None,
        max_tokens: int | None = None,
        length_penalty: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Any:
        """Caption one picture or several.

        A picture is the path of a file, an http(s) address, the bytes of a file or an open one, a Pillow picture in any
        mode, or a uint8 array `H W 3` of any size; or instead its embedding, a float array `E`, where the model reads
        those. Several are any iterable of them, or one array with one more axis in front, which is checked before the
        first is captioned.

        With `temperature`, `top_k`, `top_p` or `seed`, captions are drawn by their probability; otherwise the likeliest
        are searched for.

        Args:
          inputs: one or several.
          n: captions of each picture: the best of the beam, best first, or as many drawn; None: one, not in a list.
          errors: what becomes of a picture that cannot be read: "raise" a `UserError` that names it, or "return" one in
            the place of its caption.
          stream: give captions of several as they are made, with a batch in memory, instead of a list.
          batch_size: pictures per step, rounded up to a multiple of the devices.
          workers: threads that fetch and decode pictures, up to a batch ahead of the devices.
          beam_size, max_tokens, length_penalty: see `config.DecodeConfig`; None: as `decode` says, but a beam of at
            least `n`.
          temperature, top_k, top_p: see `sampling.Sampling`; None: 1, and no such filter.
          seed: draws the same captions of the same inputs, whatever the batch size; None: others each time.

        Returns:
          Of one picture a `Caption`, or with `n` a list of them. Of several a list of such, or an iterator.

        Raises:
          UserError: see `errors`; the model does not take such inputs or settings; a disk does not answer.
        """
        chosen = settings(
            self.decode,
            n=n,
            beam_size=beam_size,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        check_count("batch_size", batch_size)
        check_count("workers", workers)
        if errors not in ("raise", "return"):
            raise UserError(f'errors is {errors!r}: it can be "raise" or "return"')
        one = is_one(inputs)

        def load(numbered: tuple[int, Any]) -> tuple[int, np.ndarray | UserError]:
            index, given = numbered
            try:
                return index, self.reader(given)
            except Hopeless:
                raise
            except UserError as error:
                if errors == "return":
                    return index, error
                raise UserError(f"{name_of(given, None if one else index)}: {error}") from error

        items = [inputs] if one else self.reader.several(inputs, whole=errors == "raise")
        size = parallel.round_up(batch_size, local=self._local)
        found = self._all(items, load, self._generator(chosen, n), size, 0 if one else workers)
        if one:
            [caption] = found
            return caption
        return found if stream else list(found)

    __call__ = caption

    def _program(self, kind: Callable[..., Any], decode: DecodeConfig) -> Any:
        if (kind, decode) not in self._programs:
            self._programs[kind, decode] = kind(self.model, self.metadata.tokenizer, decode, local=self._local)
        return self._programs[kind, decode]

    def _generator(self, chosen: Settings, n: int | None) -> Callable[[np.ndarray, np.ndarray], list[Any]]:
        """What makes captions of a batch of inputs and its rows' numbers."""
        kind = BatchCaptioner if chosen.sampling is None else BatchSampler
        program = self._program(kind, chosen.decode)

        def generate(inputs: np.ndarray, rows: np.ndarray) -> list[Any]:
            if chosen.sampling is None:
                found = program.best(self.params, inputs, n or 1)
            else:
                found = program(self.params, inputs, rows, chosen.seed, chosen.sampling)
            return [captions[0] for captions in found] if n is None else found

        return generate

    def _all(
        self,
        items: Iterable[Any],
        load: Callable[[tuple[int, Any]], tuple[int, np.ndarray | UserError]],
        generate: Callable[[np.ndarray, np.ndarray], list[Any]],
        batch_size: int,
        workers: int,
    ) -> Iterator[Any]:
        """Captions, or errors, in order; always as many rows at once, so that one program does for all batches."""
        size = 0
        with contextlib.closing(
            pictures.load_ahead(load, enumerate(items), workers=workers, ahead=batch_size)
        ) as loaded:
            while batch := list(itertools.islice(loaded, batch_size)):
                size = size or parallel.round_up(len(batch), local=self._local)
                done: dict[int, Any] = dict(batch)
                read = {index: found for index, found in batch if isinstance(found, np.ndarray)}
                for axes in {array.ndim for array in read.values()}:  # pictures and embeddings may be mixed
                    rows = np.array([index for index, array in read.items() if array.ndim == axes], np.uint32)
                    inputs = np.stack([read[index] for index in rows.tolist()])
                    done.update(zip(rows.tolist(), generate(fill(inputs, size), fill(rows, size)), strict=False))
                yield from done.values()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax's, of what it does when it only reads."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
