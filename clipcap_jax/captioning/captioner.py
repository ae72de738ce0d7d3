"""From a checkpoint to captions."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import parallel, pictures
from clipcap_jax.captioning.batches import BatchCaptioner, BatchEmbedder, BatchSampler, Caption, finite
from clipcap_jax.captioning.inputs import Hopeless, InputReader, is_one, name_of
from clipcap_jax.captioning.insight import BatchScorer, Likelihood, Word, nearest
from clipcap_jax.captioning.opening import open_model
from clipcap_jax.captioning.settings import Settings, check_count, check_rows, settings
from clipcap_jax.captioning.sheet import Sheet, make_sheet
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import fill
from clipcap_jax.models.clipcap import ClipCap

__all__ = ["Caption", "Captioner"]


class Captioner:
    """A trained model, ready to caption.

    Where there are several processes, they caption a split together, with `generate` and `embedder`; or each captions
    by itself what it is given, with `caption` of a captioner that was made with `local`.

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
        self.embedder = BatchEmbedder(self.model)
        self._embed, self._prefix = (
            parallel.map_rows(functools.partial(_apply, self.model, part), local=local, name=name)
            for part, name in (("embed", "the vision tower"), ("prefix", "what makes the prefix"))
        )

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
        return cls(*open_model(run, str(checkpoint), **original), decode, local=local)

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
        rows: Sequence[int] | None = None,
        min_tokens: int | None = None,
        repetition_penalty: float | None = None,
        banned: Sequence[str] | None = None,
        prompt: str | None = None,
        embeddings: bool = False,
    ) -> Any:
        """Caption one picture or several.

        A picture is the path of a file, an http(s) address, the bytes of a file or an open one, a Pillow picture in any
        mode, or a uint8 array `H W 3` of any size; or instead its embedding, a float array `E`, where the model reads
        those. Several are any iterable of them, or one array with one more axis in front, which is checked before the
        first is captioned.

        With `temperature`, `top_k`, `top_p` or `seed`, captions are drawn by their probability; otherwise the likeliest
        are searched for. Both keep to `min_tokens`, `repetition_penalty`, `banned` and `prompt`.

        Args:
          inputs: one or several.
          n: captions of each picture: the best of the beam, best first, or as many drawn; None: one, not in a list.
            There are fewer where the beam holds fewer that the other settings leave.
          errors: what becomes of a picture that cannot be read, or has no caption with a finite score: "raise" a
            `UserError` that names it, or "return" one in the place of its caption.
          stream: give captions of several as they are made, with a batch in memory, instead of a list.
          batch_size: pictures per step, rounded up to a multiple of the devices.
          workers: threads that fetch and decode pictures, up to a batch ahead of the devices.
          beam_size, max_tokens, length_penalty: see `config.DecodeConfig`; None: as `decode` says, but a beam of at
            least `n`. What is written after `prompt` counts.
          temperature, top_k, top_p: see `sampling.Sampling`; None: 1, and no such filter.
          seed: draws the same captions of the same inputs, whatever the batch size; None: others each time.
          rows: the inputs' numbers, from 0 to 2**32 - 1, of which what is drawn depends; None: 0, 1 and so on.
          min_tokens: no caption ends before so many tokens are written after `prompt`, the end token not among them.
          repetition_penalty: above 1, tokens that the caption or `prompt` has already are less likely; see
            `constraints.Constraints`.
          banned: texts, words or phrases, that do not occur: as they are and with a capital letter, at the start of a
            word and within one. It is the tokens that the tokenizer makes of these which do not follow each other;
            where other tokens make up the same text, as they rarely do, it goes unnoticed.
          prompt: text that captions go on from and begin with, as the tokenizer writes it, without white space around.
          embeddings: whether to give pairs of what is said below and the picture's embedding (see `embed`).

        Returns:
          Of one picture a `Caption`, or with `n` a list of them. Of several a list of such, or an iterator. Scores are
          of what is written after `prompt`.

        Raises:
          UserError: see `errors`; the model does not take such inputs or settings; a disk does not answer.
        """
        chosen = settings(
            self.decode,
            self.metadata.tokenizer,
            n=n,
            beam_size=beam_size,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            min_tokens=min_tokens,
            repetition_penalty=repetition_penalty,
            banned=banned,
            prompt=prompt,
        )
        check_count("batch_size", batch_size)
        check_count("workers", workers)
        numbers = None if rows is None else check_rows(rows)
        if errors not in ("raise", "return"):
            raise UserError(f'errors is {errors!r}: it can be "raise" or "return"')
        one = is_one(inputs)

        def load(numbered: tuple[int, Any]) -> tuple[int, np.ndarray | UserError]:
            index, given = numbered
            found = self._read(given)
            if isinstance(found, UserError) and errors == "raise":
                raise UserError(f"{name_of(given, None if one else index)}: {found}") from found
            return index, found

        items = [inputs] if one else self.reader.several(inputs, whole=errors == "raise")
        size = parallel.round_up(batch_size, local=self._local)
        generate = self._generator(chosen, n, numbers)
        if embeddings:
            generate = self._with_embeddings(generate)
        found = self._all(items, load, generate, size, 0 if one else workers)
        if errors == "raise":
            found = _raised(found, inputs if one else None)
        if one:
            [caption] = found
            return caption
        return found if stream else list(found)

    __call__ = caption

    def show(self, inputs: Any, **settings: Any) -> Sheet:
        """Caption one picture or several for a notebook, which shows them as the model sees them, with their captions.

        Args:
          inputs: see `caption`; a picture that cannot be read has its reason beside it.
          **settings: others of `caption`.

        Raises:
          UserError: the model does not take such inputs or settings.
        """
        one = is_one(inputs)
        items = [inputs] if one else list(self.reader.several(inputs, whole=True))
        read = list(map(self._read, items))
        captions = iter(self.caption([given for given in read if isinstance(given, np.ndarray)], **settings))
        found = [given if isinstance(given, UserError) else next(captions) for given in read]
        return make_sheet([name_of(given, None if one else i) for i, given in enumerate(items)], read, found)

    def embed(self, inputs: Any, *, batch_size: int = 64, workers: int = 4) -> np.ndarray:
        """The embedding that the vision tower makes of a picture, as `clipcap embed` does.

        Args:
          inputs: one or several, as `caption` takes them; embeddings come back as they are.
          batch_size, workers: see `caption`.

        Returns:
          float32 `E`, not normalised, or `n E` of several.

        Raises:
          UserError: an input cannot be read, or the model does not take such.
        """

        return self._arrays(inputs, self._embedded, (self.metadata.embedding_width,), batch_size, workers)

    def prefix(self, inputs: Any, *, batch_size: int = 64, workers: int = 4) -> np.ndarray:
        """What GPT-2 reads of a picture before it writes: as `embed`, but float32 `P D`, or `n P D` of several."""
        config = self.model.config
        shape = (config.mapper.prefix_length, config.gpt2.width)
        return self._arrays(inputs, functools.partial(self._prefix, self.params), shape, batch_size, workers)

    def prefix_words(self, image: Any, n: int = 5) -> list[list[Word]]:
        """The prefix of one picture in words (the paper's section 4, "Prefix Interpretability").

        Args:
          image: one, as `caption` takes it.
          n: words for each vector.

        Returns:
          For each of the P vectors the pieces of the vocabulary whose embeddings have the highest cosine with it, the
          highest first.

        Raises:
          UserError: it cannot be read, or the model does not take such.
        """
        check_count("n", n)
        table = jax.device_get(self.params["gpt2"]["token_embeddings"])
        return nearest(self.prefix(_only(image)), table, self.metadata.tokenizer, n)

    def score(self, image: Any, captions: Any, *, batch_size: int = 64) -> Any:
        """How likely the model has captions of one picture.

        A caption counts as a whole one: with the token that ends captions. Where the run's config names another end
        (`evaluate.decode.stop`), such as the original's full stop, that is expected in the text.

        Args:
          image: one, as `caption` takes it.
          captions: a text or a `Caption`, or several.
          batch_size: captions per step, rounded up to a multiple of the devices.

        Returns:
          A `Likelihood`, or a list of them. Its log-likelihood, over its tokens to the power of the length penalty, is
          what a search gives a caption of these tokens as its score.

        Raises:
          UserError: the picture cannot be read; a caption is no text, has no tokens, or more than GPT-2 can read.
        """
        check_count("batch_size", batch_size)
        one = isinstance(captions, str | Caption)
        texts = list(captions) if isinstance(captions, Iterable) and not one else [captions]
        for text in texts:
            if not isinstance(text, str | Caption):
                raise UserError(f"a caption is a text or a Caption, not a {type(text).__name__}")
        embedding, scorer = self.embed(_only(image)), self._program(BatchScorer, self.decode)
        found: list[Likelihood] = scorer(self.params, embedding, list(map(str, texts)), batch_size)
        return found[0] if one else found

    def _read(self, given: Any) -> np.ndarray | UserError:
        """An input, or why it cannot be read, unless that would be so of all others."""
        try:
            return self.reader(given)
        except Hopeless:
            raise
        except UserError as error:
            return error

    def _arrays(
        self,
        inputs: Any,
        function: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        batch_size: int,
        workers: int,
    ) -> np.ndarray:
        """A function of batches, of one input or several; `shape`: of its result for one."""
        check_count("batch_size", batch_size)
        check_count("workers", workers)
        one = is_one(inputs)

        def load(numbered: tuple[int, Any]) -> tuple[int, np.ndarray | UserError]:
            index, given = numbered
            if isinstance(found := self._read(given), UserError):
                raise UserError(f"{name_of(given, None if one else index)}: {found}") from found
            return index, found

        items = [inputs] if one else self.reader.several(inputs, whole=True)
        size = parallel.round_up(batch_size, local=self._local)
        found = self._all(items, load, lambda rows, _: list(function(rows)), size, 0 if one else workers)
        array = np.array(list(found), np.float32).reshape(-1, *shape)
        return array[0] if one else array

    def _program(self, kind: Callable[..., Any], decode: DecodeConfig) -> Any:
        if (kind, decode) not in self._programs:
            self._programs[kind, decode] = kind(self.model, self.metadata.tokenizer, decode, local=self._local)
        return self._programs[kind, decode]

    def _generator(
        self, chosen: Settings, n: int | None, numbers: np.ndarray | None
    ) -> Callable[[np.ndarray, np.ndarray], list[Any]]:
        """What makes captions, or an error in their place, of a batch of inputs and which of all these are."""
        kind = BatchCaptioner if chosen.sampling is None else BatchSampler
        program = self._program(kind, chosen.decode)

        def generate(inputs: np.ndarray, rows: np.ndarray) -> list[Any]:
            if chosen.sampling is None:
                found = program.best(self.params, inputs, n or 1, chosen.constraints)
            else:
                if numbers is not None:
                    if rows.max() >= len(numbers):
                        raise UserError(f"rows has {len(numbers)} numbers, fewer than there are inputs")
                    rows = numbers[rows]
                found = program(self.params, inputs, rows, chosen.seed, chosen.sampling, chosen.constraints)
            return [finite(captions, n) for captions in found]

        return generate

    def _with_embeddings(
        self, generate: Callable[[np.ndarray, np.ndarray], list[Any]]
    ) -> Callable[[np.ndarray, np.ndarray], list[Any]]:
        """As `generate`, whose pictures the vision tower looks at once, for both."""

        def pairs(inputs: np.ndarray, rows: np.ndarray) -> list[Any]:
            embedded = self._embedded(inputs)
            found = zip(generate(embedded, rows), embedded, strict=True)
            return [captions if isinstance(captions, UserError) else (captions, row) for captions, row in found]

        return pairs

    def _embedded(self, inputs: np.ndarray) -> np.ndarray:
        """The embeddings of a batch of pictures, or those given."""
        return inputs if inputs.ndim == 2 else self._embed(self.params, inputs)

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


def _apply(model: ClipCap, part: str, params: Any, inputs: jax.Array) -> jax.Array:
    """`embed` or `prefix` of a batch."""
    return model.apply({"params": params}, inputs, method=part).astype(jnp.float32)


def _only(image: Any) -> Any:
    """One picture, rather than several.

    Raises:
      UserError: it is none.
    """
    if not is_one(image):
        raise UserError("this takes one picture or embedding at a time, not several")
    return image


def _raised(found: Iterable[Any], given: Any) -> Iterator[Any]:
    """All before the first error, which is raised, named as of `given`, or by its number."""
    for index, captions in enumerate(found):
        if isinstance(captions, UserError):
            raise UserError(f"{name_of(given, index if given is None else None)}: {captions}") from captions
        yield captions
