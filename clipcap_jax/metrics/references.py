"""References read once, captions scored against them as often as wanted."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from clipcap_jax.errors import UserError, first
from clipcap_jax.metrics.bleu import bleu
from clipcap_jax.metrics.cider import Cider
from clipcap_jax.metrics.java import Unavailable
from clipcap_jax.metrics.measure import Measure, mean
from clipcap_jax.metrics.meteor import find as find_meteor
from clipcap_jax.metrics.meteor import meteor as meteor_of
from clipcap_jax.metrics.ngrams import ReferenceNGrams
from clipcap_jax.metrics.rouge import rouge_l
from clipcap_jax.metrics.spice import SpiceConfig
from clipcap_jax.metrics.spice import find as find_spice
from clipcap_jax.metrics.spice import spice as spice_of
from clipcap_jax.metrics.words import Words, are_unspaced, name_of, split_all

# Of fewer pictures CIDEr says little.
_FEW = 10

_LIST = re.compile(r"\s*\[\s*(['\"]).*\1\s*,?\s*\]\s*", re.DOTALL)  # as Python, JSON or NumPy write one


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores under pycocoevalcap's names and in its order: Bleu_1 ... Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE.

    Attributes:
      images: the image ids, in the order of the measures' images.
      measures: by score.
      not_computed: score -> why it is not among them.
      words: what was counted as a word.
      notes: what to know before the scores are believed.
    """

    images: tuple[str, ...]
    measures: dict[str, Measure]
    not_computed: dict[str, str]
    words: Words = "ptb"
    notes: tuple[str, ...] = ()

    @property
    def overall(self) -> dict[str, float]:
        """Score of all captions together."""
        return {name: measure.overall for name, measure in self.measures.items()}

    @property
    def per_image(self) -> dict[str, dict[str, float]]:
        """Score -> image id -> score of that image's caption."""
        return {
            name: dict(zip(self.images, measure.per_image.tolist(), strict=True))
            for name, measure in self.measures.items()
        }

    def add(self, measures: Mapping[str, Measure]) -> "Scores":
        """With more measures, of the same images."""
        return dataclasses.replace(self, measures={**self.measures, **measures})


def unavailable(*, meteor: bool, spice: SpiceConfig | None, words: Words = "ptb") -> dict[str, str]:
    """Which of these scores `References.score` will not compute, and why, to be told before the others are."""
    reasons = {}
    for name, find in (("METEOR", find_meteor if meteor else None), ("SPICE", spice and (lambda: find_spice(spice)))):
        try:
            if find and words != "ptb":
                raise Unavailable(_english_alone(words))
            if find:
                find()
        except Unavailable as reason:
            reasons[name] = str(reason)
    return reasons


class References:
    """What captions are scored against, tokenised and counted once.

    The scores of a caption are those of pycocoevalcap 1.2 with its tokenizer, in the same order of images.

    Attributes:
      notes: what to know before scores are believed: that most words are whole sentences, or that pictures are few.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], words: Words = "ptb"):
        """Reads the references.

        Args:
          references: image id -> its reference captions, raw text, at least one of them with something in it. A blank
            one beside others is a reference without words, as in pycocoevalcap.
          words: see `words.split_all`. METEOR and SPICE know English alone: they are computed of "ptb"'s words only.

        Raises:
          UserError: no images; an id or a reference that is not a string; an image without references; no such words.
        """
        if not references:
            raise UserError("there is nothing to score against: no image has references")
        if odd := [image for image in references if not isinstance(image, str)]:
            raise UserError(f"{len(odd)} image ids are not strings ({_first(odd)}): convert them with str()")
        if odd := [image for image, texts in references.items() if not _is_list_of_strings(texts)]:
            raise UserError(f"references must be a list of strings for each image; {len(odd)} are not ({_first(odd)})")
        if odd := [image for image, texts in references.items() if not any(text.strip() for text in texts)]:
            raise UserError(f"{len(odd)} images have no references, or only blank ones ({_first(odd)}): leave them out")
        raw = [text for texts in references.values() for text in texts]
        tokenised = iter(split_all(raw, words))
        self._texts = {image: [next(tokenised) for _ in texts] for image, texts in references.items()}
        split = [[text.split() for text in texts] for texts in self._texts.values()]
        self._lengths = [list(map(len, texts)) for texts in split]
        self._ngrams = ReferenceNGrams(split)
        self._cider = Cider(self._ngrams, self._lengths)
        self._words = words
        self.notes = tuple(_notes(raw, len(references), words))

    def __len__(self) -> int:
        """The number of images."""
        return len(self._texts)

    def score(
        self,
        captions: Mapping[str, str],
        *,
        meteor: bool = False,
        spice: SpiceConfig | None = None,
        plain_cider: bool = False,
    ) -> Scores:
        """Scores one caption for each image.

        Args:
          captions: image id -> caption, raw text, for exactly the images that have references. A blank caption is one
            without words, and scores as such.
          meteor, spice: also start METEOR's and SPICE's Java programs. If one does not work, `not_computed` says why.
          plain_cider: also CIDEr without the D, as "CIDEr_plain".

        Raises:
          UserError: captions are missing, for unknown images, or not strings.
        """
        self.check(captions)
        texts = split_all([captions[image] for image in self._texts], self._words)
        references = list(self._texts.values())
        words = [text.split() for text in texts]
        lengths = np.array(list(map(len, words)))
        matches = self._ngrams.match(words)
        measures = {f"Bleu_{i}": measure for i, measure in enumerate(bleu(matches, lengths, self._lengths), start=1)}
        not_computed = {}

        def ask(name: str, program: Callable[[], Measure] | None) -> None:
            try:
                if program is None:
                    raise Unavailable("not asked for")
                if self._words != "ptb":
                    raise Unavailable(_english_alone(self._words))
                measures[name] = program()
            except Unavailable as reason:
                not_computed[name] = str(reason)

        ask("METEOR", (lambda: meteor_of(texts, references)) if meteor else None)
        measures["ROUGE_L"] = mean([rouge_l(text, several) for text, several in zip(texts, references, strict=True)])
        measures["CIDEr"] = mean(self._cider.score(matches, lengths))
        if plain_cider:
            measures["CIDEr_plain"] = mean(self._cider.score(matches, lengths, plain=True))
        ask("SPICE", (lambda: spice_of(texts, references, spice)) if spice else None)
        notes = (*self.notes, *_lists("captions", list(captions.values())))
        return Scores(tuple(self._texts), measures, not_computed, self._words, notes)

    def check(self, captions: Mapping[str, str]) -> None:
        """Raises what `score` would raise."""
        if captions and not self._texts.keys() & captions.keys():
            raise UserError(
                f"none of the {len(captions)} captions ({_first(list(captions))}) is of an image that has references "
                f"({_first(list(self._texts))}): they are of another data set"
            )
        problems = []
        if missing := [image for image in self._texts if image not in captions]:
            problems.append(f"{len(missing)} of {len(self)} images have no caption ({_first(missing)})")
        if extra := [image for image in captions if image not in self._texts]:
            problems.append(f"{len(extra)} captions are for images without references ({_first(extra)})")
        if odd := [image for image, caption in captions.items() if not isinstance(caption, str)]:
            problems.append(f"{len(odd)} captions are not strings ({_first(odd)})")
        if problems:
            raise UserError(f"captions and references do not fit: {'; '.join(problems)}")


def score_domains(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], domains: Mapping[str, str], scores: Scores
) -> dict[str, Scores]:
    """Scores each domain's captions alone, as nocaps' results are given.

    As CIDEr weighs words by the references of the whole set, here a domain's, the overall score is no mean of these.

    Args:
      references, captions: as `References` and its `score` take them.
      domains: image id -> domain, "" for none; other images' may be there too.
      scores: of all captions; of those that its program is slow to give, METEOR and SPICE, each domain gets its part.

    Returns:
      Domain -> scores, in alphabetical order.
    """
    found = {}
    for domain in sorted({domains.get(image, "") for image in scores.images} - {""}):
        place = np.array([i for i, image in enumerate(scores.images) if domains.get(image) == domain])
        images = [scores.images[i] for i in place]
        plain_cider = "CIDEr_plain" in scores.measures
        alone = References({image: references[image] for image in images}, scores.words).score(
            {image: captions[image] for image in images}, plain_cider=plain_cider
        )
        measures = {name: alone.measures.get(name) or whole.select(place) for name, whole in scores.measures.items()}
        found[domain] = dataclasses.replace(alone, measures=measures, not_computed=scores.not_computed)
    return found


def _english_alone(words: Words) -> str:
    return f"it knows English alone, in the words that 'ptb' makes of it, and words are {name_of(words)!r} here"


def _notes(references: Sequence[str], images: int, words: Words) -> Iterator[str]:
    if words == "ptb" and are_unspaced(references):
        yield (
            "The references are mostly in a script without spaces, of which a whole sentence counts as one word, and "
            "scores say nothing. Count characters: --words characters (training: --config.evaluate.words=characters); "
            "or segment all texts, and count with --words spaces."
        )
    yield from _lists("references", references)
    if images == 1:
        yield "CIDEr is 0 of any caption of a single picture: it weighs an n-gram by log(1 picture / 1 that has it)."
    elif images < _FEW:
        yield (
            f"CIDEr says little of {images} pictures: it weighs an n-gram by log({images} / pictures with it in a "
            f"reference), and what is in those of all {images} weighs nothing."
        )


def _lists(what: str, texts: Sequence[str]) -> Iterator[str]:
    if found := [text for text in texts if _LIST.fullmatch(text)]:
        yield (
            f"{len(found):,} {what} are the text of a list, such as {found[0]!r:.60}, and are scored as they stand: "
            "take the captions out of the lists first."
        )


def _is_list_of_strings(texts: object) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)


def _first(images: Sequence[object]) -> str:
    return first(list(map(repr, images)))
