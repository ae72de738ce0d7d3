"""References read once, captions scored against them as often as wanted."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import meteor as meteor_program
from clipcap_jax.metrics.bleu import bleu
from clipcap_jax.metrics.cider import Cider
from clipcap_jax.metrics.ngrams import MAX_ORDER, ReferenceNGrams
from clipcap_jax.metrics.ptb import tokenize_all
from clipcap_jax.metrics.rouge import rouge_l


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores under pycocoevalcap's names and in its order: Bleu_1 ... Bleu_4, METEOR, ROUGE_L, CIDEr.

    Attributes:
      overall: name -> score of all captions together.
      per_image: name -> image id -> score.
      not_computed: name -> why it is missing from the other two.
    """

    overall: dict[str, float]
    per_image: dict[str, dict[str, float]]
    not_computed: dict[str, str]


class References:
    """What captions are scored against, tokenised and counted once.

    The scores of a caption are those of pycocoevalcap 1.2 with its tokenizer, in the same order of images.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]):
        """Reads the references.

        Args:
          references: image id -> its reference captions, raw text, at least one of them with something in it. A blank
            one beside others is a reference without words, as in pycocoevalcap.

        Raises:
          UserError: no images; an id or a reference that is not a string; an image without references.
        """
        if not references:
            raise UserError("there is nothing to score against: no image has references")
        if odd := [image for image in references if not isinstance(image, str)]:
            raise UserError(f"{len(odd)} image ids are not strings ({_first(odd)}): convert them with str()")
        if odd := [image for image, texts in references.items() if not _is_list_of_strings(texts)]:
            raise UserError(f"references must be a list of strings for each image; {len(odd)} are not ({_first(odd)})")
        if odd := [image for image, texts in references.items() if not any(text.strip() for text in texts)]:
            raise UserError(f"{len(odd)} images have no references, or only blank ones ({_first(odd)}): leave them out")
        tokenised = iter(tokenize_all([text for texts in references.values() for text in texts]))
        self._texts = {image: [next(tokenised) for _ in texts] for image, texts in references.items()}
        words = [[text.split() for text in texts] for texts in self._texts.values()]
        self._lengths = [list(map(len, texts)) for texts in words]
        self._ngrams = ReferenceNGrams(words)
        self._cider = Cider(self._ngrams, self._lengths)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._texts)

    def score(self, captions: Mapping[str, str], *, meteor: bool = False) -> Scores:
        """Scores one caption for each image.

        Args:
          captions: image id -> caption, raw text, for exactly the images that have references. A blank caption is one
            without words, and scores as such.
          meteor: also start METEOR's Java program. Where that does not work, `not_computed` says why.

        Raises:
          UserError: captions are missing, for unknown images, or not strings.
        """
        self._check(captions)
        texts = tokenize_all([captions[image] for image in self._texts])
        references = list(self._texts.values())
        words = [text.split() for text in texts]
        lengths = np.array(list(map(len, words)))
        matches = self._ngrams.match(words)
        results: dict[str, tuple[float, Sequence[float] | np.ndarray]] = {}  # overall and of each image
        not_computed = {}

        overall, per_image = bleu(matches, lengths, self._lengths)
        for order in range(MAX_ORDER):
            results[f"Bleu_{order + 1}"] = overall[order], per_image[:, order]
        if not meteor:
            not_computed["METEOR"] = "not asked for"
        else:
            try:
                results["METEOR"] = meteor_program.score(texts, references)
            except meteor_program.Unavailable as reason:
                not_computed["METEOR"] = str(reason)
        rouge = [rouge_l(text, of_image) for text, of_image in zip(texts, references, strict=True)]
        results["ROUGE_L"] = float(np.mean(rouge)), rouge
        cider = self._cider.score(matches, lengths)
        results["CIDEr"] = float(np.mean(cider)), cider

        return Scores(
            overall={name: float(overall) for name, (overall, _) in results.items()},
            per_image={
                name: dict(zip(self._texts, map(float, per_image), strict=True))
                for name, (_, per_image) in results.items()
            },
            not_computed=not_computed,
        )

    def _check(self, captions: Mapping[str, str]) -> None:
        problems = []
        if missing := [image for image in self._texts if image not in captions]:
            problems.append(f"{len(missing)} of {len(self)} images have no caption ({_first(missing)})")
        if extra := [image for image in captions if image not in self._texts]:
            problems.append(f"{len(extra)} captions are for images without references ({_first(extra)})")
        if odd := [image for image, caption in captions.items() if not isinstance(caption, str)]:
            problems.append(f"{len(odd)} captions are not strings ({_first(odd)})")
        if problems:
            raise UserError(f"captions and references do not fit: {'; '.join(problems)}")


def _is_list_of_strings(texts: object) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)


def _first(images: Sequence[object]) -> str:
    named = ", ".join(map(repr, images[:3]))
    return named if len(images) <= 3 else f"{named} and {len(images) - 3} more"
