"""CLIPScore and RefCLIPScore: how well captions fit their pictures, and their references, in CLIP's eyes.

From Hessel et al., EMNLP 2021 (arXiv 2104.08718), section 3, and jmhessel/clipscore, clipscore.py. Three things are not
as in that code: all is computed in float32 (there, and in the paper, in float16 on GPUs); as in the paper's text, the
cosine with the references is not below 0; where both parts of RefCLIPScore are 0, so is their harmonic mean, which is
NaN there. The weight of 2.5 was chosen for ViT-B/32: scores of different CLIPs do not compare.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import cluster, hub, parallel, pictures
from clipcap_jax.convert import clip, clip_text
from clipcap_jax.errors import UserError
from clipcap_jax.metrics.measure import Measure, mean
from clipcap_jax.models.clip_text import ClipText, ClipTextConfig
from clipcap_jax.models.clip_vit import normalize_pixels
from clipcap_jax.models.clipcap import ClipConfig, tower
from clipcap_jax.progress import screen, track
from clipcap_jax.text.clip_tokenizer import ClipTokenizer

_PROMPT = "A photo depicts "
_WEIGHT = 2.5
_LENGTH_STEP = 8  # texts are padded to a multiple of it


class ClipScorer:
    """A whole CLIP, ready to score captions.

    Attributes:
      vision, text: the towers' sizes.
      vision_params, text_params: their parameters.
    """

    def __init__(
        self,
        vision: ClipConfig,
        vision_params: Any,
        text: ClipTextConfig,
        text_params: Any,
        tokenizer: ClipTokenizer,
    ):
        if vision.embedding_width != text.embedding_width:
            raise UserError(
                f"the towers are of different CLIPs: pictures' embeddings are {vision.embedding_width} wide, texts' "
                f"{text.embedding_width}"
            )
        if tokenizer.size != text.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.size} pieces, but the text tower {text.vocab_size}")
        self.vision, self.text = vision, text
        self.vision_params, self.text_params = parallel.replicate((vision_params, text_params))
        self._tokenizer = tokenizer
        float32 = jnp.dtype("float32")
        vision_tower, text_tower = tower(vision, float32), ClipText(text, float32)
        self._see = _map_exactly(lambda params, pixels: vision_tower.apply(params, normalize_pixels(pixels)))
        self._read = _map_exactly(text_tower.apply)

    @classmethod
    def load(cls, source: str, tokenizer: str = "") -> "ClipScorer":
        """A pretrained CLIP.

        Args:
          source: the weights of both towers: a file, a folder, or a name on the Hugging Face hub, as `clip.load_clip`.
          tokenizer: see `ClipTokenizer.load`; "": beside the weights.

        Raises:
          UserError: there are no such weights or no tokenizer, or they are not a CLIP's.
        """
        arrays, path, stored = clip.read(source)
        vision = clip.from_arrays(arrays, str(path), stored=stored)
        text = clip_text.from_arrays(arrays, str(path), stored)
        beside = str(path.parent) if Path(source).expanduser().exists() else hub.pinned(source, path)
        return cls(*vision, *text, ClipTokenizer.load(tokenizer or beside))

    def score(
        self,
        names: Sequence[str],
        pictures: Callable[[int], bytes] | np.ndarray,
        captions: Sequence[str],
        references: Sequence[Sequence[str]] = (),
        *,
        batch_size: int = 64,
        workers: int = 4,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score a caption of each of n pictures.

        Args:
          names: the pictures', for messages.
          pictures: gives the bytes of the i-th picture's file, in several threads; or their embeddings by this CLIP,
            float `n E`.
          captions: one for each picture.
          references: those of each picture, which may have none; or nothing at all.
          batch_size: the most pictures or texts a step, over all devices; rounded up to a multiple of them.
          workers: threads that read and decode pictures, ahead of the devices.

        Returns:
          CLIPScore and RefCLIPScore of each caption, both float64 of shape `n`: from 0 to 2.5, and from 0 to 10/7. The
          second is NaN where a picture has no references.

        Raises:
          UserError: a picture cannot be read; the embeddings are not of this CLIP's width; an embedding is not finite,
            or 0.
        """
        count = len(names)
        references = references or [()] * count
        if not count == len(captions) == len(references):
            raise ValueError(f"{count} names, {len(captions)} captions and {len(references)} lists of references")
        if callable(pictures):
            pictures = self.embed_pictures(names, pictures, batch_size=batch_size, workers=workers)
        elif pictures.shape != (count, self.vision.embedding_width):
            raise UserError(
                f"the embeddings have the shape {pictures.shape}; of this CLIP and {count} pictures they have "
                f"{(count, self.vision.embedding_width)}"
            )
        seen = _unit(pictures, names)
        texts = [*captions, *(text for of_picture in references for text in of_picture)]
        read = _unit(self._embed_texts(texts, batch_size), texts)
        owners = np.repeat(np.arange(count), list(map(len, references)))
        return clip_scores(seen, read[:count], read[count:], owners)

    def measures(self, *arguments: Any, **options: Any) -> dict[str, Measure]:
        """`score` of a set that has references, under the names that reports show."""
        clip, with_references = self.score(*arguments, **options)
        return {"CLIPScore": mean(clip), "RefCLIPScore": mean(with_references)}

    def embed_pictures(
        self, names: Sequence[str], read: Callable[[int], bytes], *, batch_size: int = 64, workers: int = 4
    ) -> np.ndarray:
        """Embeddings that `score` takes in the pictures' place, float32 `n E`; the arguments and errors are its own."""

        def load(index: int) -> np.ndarray:
            try:
                return pictures.preprocess(pictures.decode(read(index)), self.vision.image_size)
            except UserError as error:
                raise UserError(f"picture {names[index]}: {error}") from error
            except OSError as error:
                raise UserError(f"picture {names[index]} cannot be read: {error.strerror}") from error

        size = _even(batch_size, len(names))
        starts = range(0, len(names), size)
        mine = [range(len(names))[start:][_share(size)] for start in starts]
        loaded = pictures.load_ahead(load, itertools.chain(*mine), workers=workers, ahead=2 * size)
        embeddings = np.empty((len(names), self.vision.embedding_width), np.float32)
        shape = size // cluster.count(), self.vision.image_size, self.vision.image_size, 3
        pixels = np.zeros(shape, np.uint8)  # one shape
        with contextlib.closing(loaded), contextlib.closing(_track(starts, "CLIPScore: pictures")) as shown:
            for start, share in zip(shown, mine, strict=True):
                for i in range(len(share)):
                    pixels[i] = next(loaded)
                rows = embeddings[start : start + size]
                rows[:] = self._see(self.vision_params, pixels)[: len(rows)]
        return embeddings

    def _embed_texts(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Float32 `n E`, of the texts behind the prompt."""
        tokens = self._tokenizer.encode([_PROMPT + text for text in texts], self.text.context_length)
        size = _even(batch_size, len(texts))
        # Texts of about one length go together, as a short one costs less; the longest first, so that the batch that is
        # filled up is a cheap one.
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))
        embeddings = np.empty((len(texts), self.text.embedding_width), np.float32)
        for start in _track(range(0, len(texts), size), "CLIPScore: texts"):
            rows = order[start : start + size]
            longest = -(-len(tokens[rows[0]]) // _LENGTH_STEP) * _LENGTH_STEP
            batch = np.zeros((size, min(longest, self.text.context_length)), np.int32)
            for i, row in enumerate(rows):
                batch[i, : len(tokens[row])] = tokens[row]
            embeddings[rows] = self._read(self.text_params, batch[_share(size)])[: len(rows)]
        return embeddings


def clip_scores(
    pictures: np.ndarray, captions: np.ndarray, references: np.ndarray, owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """CLIPScore and RefCLIPScore from embeddings of unit length.

    Args:
      pictures, captions: float64 `n E`.
      references: float64 `m E`, of all pictures.
      owners: int `m`, the picture that each reference belongs to.

    Returns:
      As `ClipScorer.score`.
    """
    score = _WEIGHT * np.maximum(np.einsum("ne,ne->n", pictures, captions), 0)
    best = np.full(len(pictures), np.nan)
    np.fmax.at(best, owners, np.einsum("me,me->m", captions[owners], references))
    best = np.maximum(best, 0)  # NaN stays
    both = score + best
    return score, np.divide(2 * score * best, both, out=both.copy(), where=both != 0)


def _map_exactly(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A tower on all devices, in true float32."""

    def exactly(params: Any, batch: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return apply({"params": params}, batch)

    return parallel.map_rows(exactly, name="a tower of CLIP")


def _share(size: int) -> slice:
    """This process's rows of a batch."""
    return slice(cluster.index() * size // cluster.count(), (cluster.index() + 1) * size // cluster.count())


def _even(batch_size: int, count: int) -> int:
    """A size up to `batch_size` of batches of which the last need hardly be filled up."""
    batches = max(1, -(-count // batch_size))
    return parallel.round_up(max(1, -(-count // batches)))


def _track(batches: Sequence[int], description: str) -> Any:
    return track(
        batches,
        description,
        total=len(batches),
        console=screen(stderr=True, quiet=not cluster.is_main()),
        transient=True,
    )


def _unit(embeddings: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Scaled to unit length, in float64."""
    embeddings = np.asarray(embeddings, np.float64)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise UserError(f"{len(bad)} embeddings are not finite or 0, the first that of {names[bad[0]]!r}")
    return embeddings / norms
