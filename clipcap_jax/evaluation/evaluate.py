"""A checkpoint, a split of a data set: captions, scores and a page to look at."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from clipcap_jax import files, metrics
from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.datasets import shapes
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.evaluation.clipscore import ClipScorer
from clipcap_jax.evaluation.report import Row, captions_table, print_scores, write_page
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.inputs.embed import encoder_name
from clipcap_jax.metrics import References, Scores, SpiceConfig, Words, coco_files, paper, score_domains
from clipcap_jax.metrics.health import health
from clipcap_jax.metrics.measure import Measure, mean
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.pictures import read_same
from clipcap_jax.progress import track
from clipcap_jax.training.validation import LossMeter

_PRINTED = 10  # captions shown on the screen


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a captioner made of a split.

    Attributes:
      data: the split.
      captions: one per example, in its order.
      scores: of all captions.
      domains: of each domain's captions, where the split has domains.
      loss, loss_permuted: nats per token of the references; the second with every reference beside another picture.
    """

    data: CaptionData
    captions: list[Caption]
    scores: Scores
    domains: dict[str, Scores]
    loss: float
    loss_permuted: float


def embed_all(captioner: Captioner, data: CaptionData, *, batch_size: int, console: Console) -> CaptionData:
    """Look at every picture of a split once: what this gives, `caption_all` and `evaluate` take in its place.

    They take the split itself too, but then a picture is decoded and looked at anew whenever it is needed, twice for
    each reference. A split of embeddings stays as it is.

    Args:
      captioner, data, batch_size, console: as `caption_all` takes them.

    Raises:
      UserError: as `caption_all`; a picture cannot be decoded.
    """
    _check(data)
    if data.embedding_width is not None:
        return data
    indices, workers = np.arange(len(data)), captioner.metadata.config.data.workers
    embeddings = captioner.embedder.all(captioner.params, data, indices, batch_size, workers)
    return data.embedded(indices, track(embeddings, f"Looking at {data.name}", total=len(data), console=console))


def caption_all(captioner: Captioner, data: CaptionData, *, batch_size: int, console: Console) -> list[Caption]:
    """Caption every example of a split once, in its order, on all devices.

    Args:
      captioner: from a checkpoint.
      data: the split; of its examples either all have references or none.
      batch_size: pictures per step, over all devices; rounded up to a multiple of them.
      console: where progress is shown.

    Raises:
      UserError: some examples have references and some have none, or ids occur twice.
    """
    _check(data)
    captions = captioner.generate.all(captioner.params, data, np.arange(len(data)), batch_size)
    return list(track(captions, f"Captioning {data.name}", total=len(data), console=console))


def _check(data: CaptionData) -> None:
    bare = sum(not captions for captions in data.captions)
    if 0 < bare < len(data):
        raise UserError(f"{data.name} has {bare} examples without references: there is nothing to score against")
    if len(set(data.image_ids)) < len(data):
        raise UserError(f"{data.name} has image ids that occur twice")


def evaluate(
    captioner: Captioner,
    data: CaptionData,
    captions: list[Caption],
    *,
    batch_size: int,
    words: Words = "ptb",
    meteor: bool = False,
    spice: SpiceConfig | None = None,
    clip: ClipScorer | None = None,
) -> Evaluation:
    """Score what a captioner made of a split.

    Args:
      captioner, data, batch_size: as `caption_all` took them.
      captions: what it gave.
      words: what scores count as a word; see `metrics.words.split_all`.
      meteor, spice: also METEOR and SPICE, which need Java.
      clip: also CLIPScore and RefCLIPScore by this CLIP, of the pictures, or of embeddings if it made them.

    Raises:
      UserError: a picture cannot be read that CLIPScore needs.
    """
    config, metadata = captioner.metadata.config, captioner.metadata
    texts = dict(zip(data.image_ids, (caption.text for caption in captions), strict=True))
    references = dict(zip(data.image_ids, data.captions, strict=True))
    more: dict[str, Measure] = {}
    if clip is not None:  # first, as a picture may be missing, and SPICE takes minutes
        seen = _embeddings(data, clip)
        pictures = functools.partial(_read_picture, data) if seen is None else seen
        more |= clip.measures(data.image_ids, pictures, list(texts.values()), data.captions)
    if data.name.startswith("shapes/"):
        right = [shapes.names_exactly(text, shapes.scene_of(image_id)) for image_id, text in texts.items()]
        more |= {"exact scenes": mean(right)}
    pairs = data.pairs(metadata.tokenizer, config.data.max_tokens, config.train.targets)
    meter = LossMeter(captioner.model, config.train.targets)
    # With all processes, before METEOR and SPICE keep the first one busy.
    loss = meter(captioner.params, data, pairs, batch_size)
    loss_permuted = meter(captioner.params, data, pairs, batch_size, permuted=True)
    scores = References(references, words).score(texts, meteor=meteor, spice=spice).add(more)
    return Evaluation(
        data=data,
        captions=captions,
        scores=scores,
        domains=score_domains(references, texts, dict(zip(data.image_ids, data.domains, strict=True)), scores),
        loss=loss,
        loss_permuted=loss_permuted,
    )


def _embeddings(data: CaptionData, clip: ClipScorer) -> np.ndarray | None:
    """The data set's, if this CLIP made them."""
    if not data.encoder or data.encoder != encoder_name(clip.vision, clip.vision_params):
        return None
    return data.inputs(np.arange(len(data)))


def _read_picture(data: CaptionData, index: int) -> bytes:
    if (image := data.image(index)) is not None:
        return image
    if not data.image_paths[index]:
        raise UserError(f"{data.name} neither holds it nor says where it lies")
    return read_same(data.image_paths[index], data.pictures[index])


def open_data(captioner: Captioner, name: str, split: str, data_dir: str) -> CaptionData:
    """A split, as the captioner reads it; empty `name` and `data_dir`: those it was trained on.

    A captioner that learnt from embeddings and has a vision tower too reads the pictures where there are no embeddings.
    """
    config = captioner.metadata.config.data
    opened = open_split(name or config.name, split, data_dir or config.data_dir)
    stored = config.input == "embedding" and (opened.embedding_width is not None or captioner.image_size is None)
    data = CaptionData(opened, None if stored else captioner.image_size)
    if data.encoder and captioner.metadata.encoder and data.encoder != captioner.metadata.encoder:
        raise UserError(
            f"{data.name} holds embeddings from {data.encoder}, but the checkpoint was trained on "
            f"embeddings from {captioner.metadata.encoder}"
        )
    return data


def name_of(captioner: Captioner, data: CaptionData, words: Words = "ptb") -> str:
    """A folder's name that no other evaluation of a run has: by data set, split, step, search and words."""
    decode = captioner.decode
    penalty = "" if decode.length_penalty == 1 else f"-penalty{decode.length_penalty:g}"
    counted = "" if words == "ptb" else f"-{metrics.words.name_of(words)}"
    return f"{data.name.replace('/', '-')}-{captioner.step}-beam{decode.beam_size}{penalty}{counted}"


def is_done(data: CaptionData, folder: Path) -> bool:
    """Whether a folder holds results.

    Raises:
      UserError: it cannot be read.
    """
    last = "page.html" if any(data.captions) else "captions.json"
    try:
        with files.reached(folder):
            return (folder / last).exists()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        with files.reached(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield
    except OSError as error:
        raise UserError(f"the results cannot be written to {folder}: {error.strerror}") from error


def write_captions(data: CaptionData, captions: list[Caption], folder: Path) -> None:
    """Write `captions.json` (COCO results format) to `folder`, on a disk or such as gs://, which is made."""
    texts = {image_id: caption.text for image_id, caption in zip(data.image_ids, captions, strict=True)}
    with _written_to(folder), files.whole(folder / "captions.json") as path:
        coco_files.write_results(path, texts)


def write(evaluation: Evaluation, captioner: Captioner, folder: Path, console: Console) -> None:
    """Print the scores; write `scores.json`, `scores.md` and `page.html` to `folder`."""
    data, captions = evaluation.data, evaluation.captions
    decode = dataclasses.asdict(captioner.decode)
    scorecard = Scorecard(
        scores=evaluation.scores,
        domains=evaluation.domains,
        health=health(
            [caption.text for caption in captions],
            [caption.finished for caption in captions],
            evaluation.scores.words,
        ),
        details={
            "data set": data.name,
            "checkpoint": f"step {captioner.step}",
            "decoding": " ".join(f"{name}={value}" for name, value in decode.items() if value != ""),
            "date": datetime.datetime.now().isoformat(" ", "minutes"),
        },
        paper=paper.rows_for(data.name),
        losses={"loss": evaluation.loss, "loss_permuted": evaluation.loss_permuted},
    )
    title, rows = f"Captions of {data.name}", list(_rows(evaluation))
    console.print(captions_table(rows[:: -(-len(rows) // _PRINTED)]))
    print_scores(scorecard, console)
    with _written_to(folder):
        for name, text in (("scores.json", scorecard.to_json()), ("scores.md", scorecard.to_markdown(title))):
            with files.whole(folder / name) as path:
                path.write_bytes(text.encode(errors="backslashreplace"))
        with files.whole(folder / "page.html") as path:
            write_page(path, title=title, rows=rows, scorecard=scorecard)
    console.print(f"Captions, scores and a page with the pictures: {folder}", soft_wrap=True)


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    data, per_image = evaluation.data, evaluation.scores.per_image
    for i, (image_id, caption) in enumerate(zip(data.image_ids, evaluation.captions, strict=True)):
        yield Row(
            image_id=image_id,
            caption=caption.text,
            references=data.captions[i],
            scores={name: scores[image_id] for name, scores in per_image.items()},
            read_image=functools.partial(data.image, i),
            image_path=data.image_paths[i],
            picture=data.pictures[i],
            finished=caption.finished,
        )
