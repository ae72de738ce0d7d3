"""A checkpoint, a split of a data set: captions, scores and a page to look at."""

import dataclasses
import datetime
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from clipcap_jax.captioner import Caption, Captioner
from clipcap_jax.data import CaptionData
from clipcap_jax.datasets import shapes
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.embed import encoder_name
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import References, Scores, SpiceConfig, coco_files, paper, score_domains
from clipcap_jax.metrics.clipscore import ClipScorer
from clipcap_jax.metrics.health import health
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.progress import track
from clipcap_jax.report import Row, captions_table, scores_table, write_page
from clipcap_jax.validation import LossMeter

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


def caption_all(captioner: Captioner, data: CaptionData, *, batch_size: int, console: Console) -> list[Caption]:
    """Caption every example of a split once, in its order, on all devices.

    Args:
      captioner: from a checkpoint.
      data: the split.
      batch_size: pictures per step, over all devices; rounded up to a multiple of them.
      console: where progress is shown.

    Raises:
      UserError: the split has ids that occur twice.
    """
    if len(set(data.image_ids)) < len(data):
        raise UserError(f"{data.name} has image ids that occur twice")
    captions = captioner.generate.all(captioner.params, data, np.arange(len(data)), batch_size)
    return list(track(captions, f"Captioning {data.name}", total=len(data), console=console))


def evaluate(
    captioner: Captioner,
    data: CaptionData,
    *,
    batch_size: int,
    meteor: bool = False,
    spice: SpiceConfig | None = None,
    clip: ClipScorer | None = None,
    console: Console,
) -> Evaluation:
    """Caption every example of a split and score the captions.

    Args:
      captioner, data, batch_size, console: as `caption_all` takes them; every example has references.
      meteor, spice: also METEOR and SPICE, which need Java.
      clip: also CLIPScore and RefCLIPScore by this CLIP, of the pictures, or of embeddings if it made them.

    Raises:
      UserError: the split has examples without references, or ids that occur twice.
    """
    config, metadata = captioner.metadata.config, captioner.metadata
    if bare := sum(not captions for captions in data.captions):
        raise UserError(f"{data.name} has {bare} examples without references: there is nothing to score against")
    captions = caption_all(captioner, data, batch_size=batch_size, console=console)
    texts = dict(zip(data.image_ids, (caption.text for caption in captions), strict=True))
    references = dict(zip(data.image_ids, data.captions, strict=True))
    scores = References(references).score(texts, meteor=meteor, spice=spice)
    if data.name.startswith("shapes/"):
        right = [shapes.names_exactly(text, shapes.scene_of(image_id)) for image_id, text in texts.items()]
        scores = scores.add({"exact scenes": mean(right)})
    if clip is not None:
        seen = _embeddings(data, clip)
        pictures = functools.partial(_read_picture, data) if seen is None else seen
        scores = scores.add(clip.measures(data.image_ids, pictures, list(texts.values()), data.captions))
    pairs = data.pairs(metadata.tokenizer, config.data.max_tokens, config.train.targets)
    loss = LossMeter(captioner.model, config.train.targets)
    return Evaluation(
        data=data,
        captions=captions,
        scores=scores,
        domains=score_domains(references, texts, dict(zip(data.image_ids, data.domains, strict=True)), scores),
        loss=loss(captioner.params, data, pairs, batch_size),
        loss_permuted=loss(captioner.params, data, pairs, batch_size, permuted=True),
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
    return Path(data.image_paths[index]).read_bytes()


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


def write_captions(data: CaptionData, captions: list[Caption], folder: Path) -> None:
    """Write `captions.json` (COCO results format) to `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {image_id: caption.text for image_id, caption in zip(data.image_ids, captions, strict=True)}
    coco_files.write_results(folder / "captions.json", texts)


def write(evaluation: Evaluation, captioner: Captioner, folder: Path, console: Console) -> None:
    """Write `captions.json`, `scores.json`, `scores.md` and `page.html` to `folder`; print the scores."""
    data, captions = evaluation.data, evaluation.captions
    write_captions(data, captions, folder)
    decode = dataclasses.asdict(captioner.decode)
    scorecard = Scorecard(
        scores=evaluation.scores,
        domains=evaluation.domains,
        health=health([caption.text for caption in captions], [caption.finished for caption in captions]),
        details={
            "data set": data.name,
            "checkpoint": f"step {captioner.step}",
            "decoding": " ".join(f"{name}={value}" for name, value in decode.items()),
            "date": datetime.datetime.now().isoformat(" ", "minutes"),
        },
        paper=paper.rows_for(data.name),
        losses={"loss": evaluation.loss, "loss_permuted": evaluation.loss_permuted},
    )
    title = f"Captions of {data.name}"
    (folder / "scores.json").write_text(scorecard.to_json(), encoding="utf-8")
    (folder / "scores.md").write_text(scorecard.to_markdown(title), encoding="utf-8")
    rows = list(_rows(evaluation))
    write_page(folder / "page.html", title=title, rows=rows, scorecard=scorecard)
    console.print(captions_table(rows[:: -(-len(rows) // _PRINTED)]))
    console.print(scores_table(scorecard))
    for name, fact in scorecard.facts().items():
        console.print(f"{name}: {fact}", highlight=False, markup=False)
    console.print(f"Captions, scores and a page with the pictures: {folder}", highlight=False, soft_wrap=True)


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
            finished=caption.finished,
        )
