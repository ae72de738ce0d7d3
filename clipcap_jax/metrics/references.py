"""References read once, captions scored against them as often as wanted."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from . import meteor as meteor_program
from .bleu import bleu
from .cider import Cider
from .ngrams import MAX_ORDER, ReferenceNGrams
from .ptb import tokenize
from .rouge import rouge_l


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores under pycocoevalcap's names and in its order: Bleu_1 ... Bleu_4, METEOR, ROUGE_L, CIDEr."""

    overall: dict[str, float]
    per_image: dict[str, dict[str, float]]  # score -> image id -> value
    not_computed: dict[str, str]  # score -> why it is missing from the other two


class References:
    """What captions are scored against: tokenised and counted once, used for many `score` calls.

    Args:
        references: image id -> its reference captions, raw text, at least one of them not blank. Blank ones beside
            others count as references without words, as in pycocoevalcap.

    Raises:
        UserError: no images; an id or a caption that is not a string; an image without a reference.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        if not references:
            raise UserError("There are no references to score against: the set has no images.")
        if odd := [image for image in references if not isinstance(image, str)]:
            raise UserError(f"Image ids must be strings; these are not: {_name(odd)}. Convert them with str().")
        if odd := [image for image, texts in references.items() if not _is_list_of_strings(texts)]:
            raise UserError(f"An image's references must be a list of strings; they are not for {_name(odd)}.")
        if odd := [image for image, texts in references.items() if not any(text.strip() for text in texts)]:
            raise UserError(f"Every image needs a reference caption that is not blank; none for {_name(odd)}.")
        self._tokenised = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
        words = [[text.split() for text in texts] for texts in self._tokenised.values()]
        self._lengths = [list(map(len, texts)) for texts in words]
        self._ngrams = [ReferenceNGrams(words, order) for order in range(1, MAX_ORDER + 1)]
        self._cider = Cider(self._ngrams, self._lengths)

    def __len__(self) -> int:
        """How many images."""
        return len(self._tokenised)

    def score(self, captions: Mapping[str, str], *, meteor: bool = False) -> Scores:
        """Scores one caption for every image; an empty caption is a caption without words, and scores as such.

        Args:
            captions: image id -> caption, raw text, for exactly the images of the references.
            meteor: also run METEOR's own Java program, some seconds for a thousand images. Where it cannot run, the
                reason is in `not_computed`.

        Raises:
            UserError: captions missing, for unknown images, or not strings.
        """
        self._check(captions)
        tokenised = [tokenize(captions[image]) for image in self._tokenised]
        words = [caption.split() for caption in tokenised]
        lengths = np.array(list(map(len, words)))
        matches = [order.match(words) for order in self._ngrams]
        overall: dict[str, float] = {}
        per_image: dict[str, dict[str, float]] = {}
        not_computed: dict[str, str] = {}

        def add(name: str, value: float, image_values: Sequence[float] | np.ndarray) -> None:
            overall[name] = float(value)
            per_image[name] = dict(zip(self._tokenised, map(float, image_values), strict=True))

        bleu_overall, bleu_per_image = bleu(matches, lengths, self._lengths)
        for order, (value, image_values) in enumerate(zip(bleu_overall, bleu_per_image.T, strict=True), start=1):
            add(f"Bleu_{order}", value, image_values)

        if meteor:
            try:
                add("METEOR", *meteor_program.score(tokenised, list(self._tokenised.values())))
            except meteor_program.Unavailable as reason:
                not_computed["METEOR"] = str(reason)
        else:
            not_computed["METEOR"] = "not asked for"

        # split(" ") as pycocoevalcap does: a caption without words is one empty word here, so nothing divides by 0.
        rouge = [
            rouge_l(caption.split(" "), [text.split(" ") for text in texts])
            for caption, texts in zip(tokenised, self._tokenised.values(), strict=True)
        ]
        add("ROUGE_L", np.mean(rouge), rouge)
        cider = self._cider.score(matches, lengths)
        add("CIDEr", cider.mean(), cider)
        return Scores(overall, per_image, not_computed)

    def _check(self, captions: Mapping[str, str]) -> None:
        problems = []
        if missing := [image for image in self._tokenised if image not in captions]:
            problems.append(f"{len(missing)} of {len(self)} images have no caption ({_name(missing)})")
        if extra := [image for image in captions if image not in self._tokenised]:
            problems.append(f"{len(extra)} captions are for images without references ({_name(extra)})")
        if odd := [image for image, caption in captions.items() if not isinstance(caption, str)]:
            problems.append(f"{len(odd)} captions are not strings ({_name(odd)})")
        if problems:
            raise UserError(f"Captions and references do not fit: {'; '.join(problems)}.")


def _is_list_of_strings(texts: object) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)


def _name(images: Sequence[object], most: int = 3) -> str:
    """Names the first few, for messages."""
    named = ", ".join(map(repr, images[:most]))
    return named if len(images) <= most else f"{named} and {len(images) - most} more"
