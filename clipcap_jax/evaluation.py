"""A checkpoint, a split of a data set: captions, scores and a page to look at."""

import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from clipcap_jax.captioner import Caption, Captioner
from clipcap_jax.data import CaptionData
from clipcap_jax.datasets import shapes
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import References, Scores
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
      loss, loss_permuted: nats per token of the references; the second with every reference beside another picture.
    """

    data: CaptionData
    captions: list[Caption]
    scores: Scores
    loss: float
    loss_permuted: float

    @property
    def distinct(self) -> int:
        return len({caption.text for caption in self.captions})

    @property
    def unfinished(self) -> int:
        return sum(not caption.finished for caption in self.captions)


def evaluate(captioner: Captioner, data: CaptionData, *, batch_size: int, meteor: bool, console: Console) -> Evaluation:
    """Caption every example of a split once, on all devices, and score the captions.

    Args:
      captioner: from a checkpoint.
      data: the split, with references.
      batch_size: pictures per step, over all devices; rounded up to a multiple of them.
      meteor: also METEOR, which needs Java.
      console: where progress is shown.

    Raises:
      UserError: the split has no references, or METEOR cannot be computed.
    """
    config, metadata = captioner.metadata.config, captioner.metadata
    if any(not captions for captions in data.captions):
        raise UserError(f"{data.name} has examples without references: there is nothing to score against")
    if len(set(data.image_ids)) < len(data):
        raise UserError(f"{data.name} has image ids that occur twice")
    captions = list(
        track(
            captioner.generate.all(captioner.params, data, np.arange(len(data)), batch_size),
            f"Captioning {data.name}",
            total=len(data),
            console=console,
        )
    )
    references = References(dict(zip(data.image_ids, data.captions, strict=True)))
    by_id = {image_id: caption.text for image_id, caption in zip(data.image_ids, captions, strict=True)}
    pairs = data.pairs(metadata.tokenizer, config.data.max_tokens, config.train.targets)
    loss = LossMeter(captioner.model, config.train.targets)
    return Evaluation(
        data=data,
        captions=captions,
        scores=references.score(by_id, meteor=meteor),
        loss=loss(captioner.params, data, pairs, batch_size),
        loss_permuted=loss(captioner.params, data, pairs, batch_size, permuted=True),
    )


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


def write(evaluation: Evaluation, captioner: Captioner, folder: Path, console: Console) -> None:
    """Write `captions.json` (COCO results format), `scores.json` and `page.html` to `folder`; print the scores."""
    folder.mkdir(parents=True, exist_ok=True)
    data, scores = evaluation.data, evaluation.scores
    overall = dict(scores.overall)
    if data.name.startswith("shapes/"):
        right = [
            shapes.names_exactly(caption.text, shapes.scene_of(image_id))
            for caption, image_id in zip(evaluation.captions, data.image_ids, strict=True)
        ]
        overall["exact scenes"] = sum(right) / len(right)
    results = [
        {"image_id": coco_id(image_id), "caption": caption.text}
        for image_id, caption in zip(data.image_ids, evaluation.captions, strict=True)
    ]
    (folder / "captions.json").write_text(json.dumps(results, ensure_ascii=False, indent=0))
    details = {
        "data set": data.name,
        "checkpoint": f"step {captioner.step}",
        "decoding": " ".join(f"{name}={value}" for name, value in dataclasses.asdict(captioner.decode).items()),
        "pictures": str(len(data)),
        "distinct captions": str(evaluation.distinct),
        "unfinished captions": str(evaluation.unfinished),
        "loss": f"{evaluation.loss:.4f} nats per token, {evaluation.loss_permuted:.4f} with other pictures",
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
    }
    numbers = {**overall, "loss": evaluation.loss, "loss_permuted": evaluation.loss_permuted}
    report = {"scores": numbers, "not_computed": scores.not_computed, "details": details}
    (folder / "scores.json").write_text(json.dumps(report, indent=2))
    rows = list(_rows(evaluation))
    write_page(
        folder / "page.html",
        title=f"Captions of {data.name}",
        rows=rows,
        scores=overall,
        not_computed=scores.not_computed,
        details=details,
    )
    console.print(captions_table(rows[:: -(-len(rows) // _PRINTED)]))
    console.print(scores_table(overall, scores.not_computed))
    for name, detail in details.items():
        console.print(f"{name}: {detail}", highlight=False, markup=False)
    console.print(f"Captions, scores and a page with the pictures: {folder}", highlight=False, soft_wrap=True)


def coco_id(image_id: str) -> str | int:
    """The id as a number where it is one: COCO's server takes nothing else."""
    return int(image_id) if image_id.isdecimal() and str(int(image_id)) == image_id else image_id


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    data = evaluation.data
    cider: dict[str, Any] = evaluation.scores.per_image["CIDEr"]
    for i, (image_id, caption) in enumerate(zip(data.image_ids, evaluation.captions, strict=True)):
        yield Row(
            image_id=image_id,
            caption=caption.text,
            references=data.captions[i],
            score=cider[image_id],
            image=data.image(i),
            image_path=data.image_paths[i],
            finished=caption.finished,
        )
