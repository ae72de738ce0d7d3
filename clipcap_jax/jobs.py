"""Whole jobs, as the commands and notebooks start them: prepare a data set, train a captioner, score a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from rich.console import Console

from clipcap_jax import config_files, files
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen, without_warnings

if TYPE_CHECKING:
    from clipcap_jax.datasets import RecordsSource, Summary
    from clipcap_jax.evaluation.clipscore import ClipScorer
    from clipcap_jax.evaluation.evaluate import Evaluation
    from clipcap_jax.metrics import Words

# Data sets that are read from their owners' files; docs/ has a page for each.
PUBLISHED = {
    "coco": "COCO Captions with Karpathy's splits",
    "tfds-coco": "the same from TFDS's own coco_captions",
    "flickr8k": "Flickr8k",
    "flickr30k": "Flickr30k",
    "cc3m": "Conceptual Captions, from img2dataset's output or the owners' list",
    "cc12m": "Conceptual 12M, from img2dataset's output or the owners' list",
    "nocaps": "nocaps val with its domains, and test",
}
KARPATHY = ("coco", "flickr8k", "flickr30k")  # whose captions are in Karpathy's archive
WITH_PICTURES = ("coco", "nocaps")  # whose pictures can be fetched


class HasResults(UserError):
    """A folder for an evaluation holds one."""

    def __init__(self, folder: Path):
        super().__init__(f"{folder} holds results: name another folder by --output, or replace them by --overwrite")
        self.folder = folder


def prepare(
    source: "str | RecordsSource",
    data_dir: str = "data",
    *,
    manual_dir: str | Path = "",
    download: bool = False,
    download_images: bool = False,
    max_skipped: float = 0.01,
    processes: int = 1,
    beam: Sequence[str] | None = None,
) -> "Summary":
    """Prepare a data set for training, unless it is there already; `clipcap prepare` is the same.

    Args:
      source: "shapes", one of `PUBLISHED` by name, or a `RecordsSource`: one's own pictures or embeddings.
      data_dir: the folder of prepared data sets.
      manual_dir: the folder with the owners' files of a published one.
      download, download_images: fetch Karpathy's captions (`KARPATHY`), or pictures (`WITH_PICTURES`), to it.
      max_skipped: how many pictures or records may be bad, as a share of all.
      processes, beam: who writes the shards: see `datasets.prepare.prepare`.

    Returns:
      What was kept and what was skipped; `rich.print` shows it.

    Raises:
      UserError: there is no such data set, or it cannot be prepared.
    """
    from clipcap_jax import datasets  # which takes seconds

    workers: dict[str, Any] = {"processes": processes, "beam": beam}
    if not 0 <= max_skipped <= 1:
        raise UserError(f"max_skipped is {max_skipped}: it has to be a share from 0 to 1")
    if processes < 1:
        raise UserError(f"processes is {processes}: it has to be a number from 1 on")
    if isinstance(source, str) and source in PUBLISHED:
        found = _published(source, manual_dir, captions=download, pictures=download_images)
        return datasets.prepare.prepare(found, data_dir, max_skipped=max_skipped, **workers)
    if manual_dir or download or download_images:
        raise UserError(f"manual_dir, download and download_images are of published data sets: {', '.join(PUBLISHED)}")
    if isinstance(source, datasets.RecordsSource):
        return datasets.prepare_records(source, data_dir, max_skipped, **workers)
    if source != "shapes":
        raise UserError(
            f"there is no data set {source!r} to prepare: there are shapes, {', '.join(PUBLISHED)}, and your own as a "
            "RecordsSource"
        )
    return datasets.prepare_shapes(data_dir, **workers)


def _published(name: str, manual_dir: str | Path, *, captions: bool, pictures: bool) -> Any:
    """A published data set's source, with what is to be fetched."""
    from clipcap_jax.datasets import coco, conceptual, downloads, flickr, nocaps, tfds_coco
    from clipcap_jax.datasets.source import first_problems

    if not manual_dir:
        raise UserError(f"{name} is prepared from its owners' files: name the folder that holds them, manual_dir")
    for wanted, what, those in ((captions, "download", KARPATHY), (pictures, "download_images", WITH_PICTURES)):
        if wanted and name not in those:
            raise UserError(f"{what} is of {', '.join(those)}, not of {name}")
    folder = str(manual_dir)
    if name in KARPATHY and (captions or pictures):
        downloads.download_karpathy(folder, name, pictures=pictures)
    if name == "nocaps" and pictures and (lost := downloads.download_nocaps(folder)):
        raise UserError(
            f"{len(lost):,} pictures could not be fetched. Run this again to try again, or without --download-images "
            f"to go on without them. The first:\n{first_problems(lost)}"
        )
    if name == "coco":
        return coco.coco_source(folder)
    if name == "tfds-coco":
        return tfds_coco.tfds_coco_source(folder)
    if name == "nocaps":
        return nocaps.nocaps_source(folder)
    if name.startswith("flickr"):
        return flickr.flickr_source(name, folder)
    return conceptual.conceptual_source(name, folder)


def train(
    config: str | Path | ConfigDict | dict[str, Any] | None = None,
    workdir: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    wandb: str = "",
    processes: int = 1,
    console: Console | None = None,
) -> Path:
    """Train a captioner, or go on where the run in its folder stopped; `clipcap train` is the same.

    Args:
      config: what to train, and how: a config by name, such as "flickr8k:pixels", a .py file, or what such a one gives;
        None: that of the run in `workdir`.
      workdir: the run's folder; None: runs/<name of the config>.
      settings: what to change of the config, such as {"train.epochs": 3}; or as a command line has it.
      wandb: the project at Weights & Biases that gets the numbers too; "" for none.
      processes: how many draw the data set `shapes`, where that is asked for and not there: see `prepare`.
      console: where progress is shown, as `progress.screen` makes one; None: on the screen.

    Returns:
      The run's folder. After Ctrl-C, which stops it with a checkpoint, too: the same call then goes on.

    Raises:
      UserError: there is no such config, setting, data set or run; or see `training.loop.train`.
    """
    values = None
    if isinstance(config, str | Path):
        values = config_files.read(str(config))
        workdir = workdir or f"runs/{config_files.name_of(str(config))}"
    elif config is not None:
        values = ConfigDict(config.to_dict() if isinstance(config, ConfigDict) else config)  # not the caller's
    if not workdir:
        raise UserError(
            f"name the run's folder, workdir, or a config that has a name: {', '.join(config_files.names())}"
        )
    if values is not None:
        config_files.change(values, _arguments(settings))

    from clipcap_jax import cluster  # which takes seconds
    from clipcap_jax import config as config_lib
    from clipcap_jax.checkpoints import settings as stored
    from clipcap_jax.checkpoints import store
    from clipcap_jax.training import loop

    run = store.run_folder(workdir)
    if values is None:
        if (own := stored.read(run)) is None:
            names = ", ".join(config_files.names())
            raise UserError(f"{run} holds no run to go on with: name by --config what to train there, such as {names}")
        values = config_files.as_read(own)
        config_files.change(values, _arguments(settings))
    chosen, console = config_lib.from_dict(values.to_dict()), console or screen()
    if chosen.data.name == "shapes":  # drawn rather than downloaded, so nobody needs to ask for it
        with cluster.in_turn():
            console.print(prepare("shapes", chosen.data.data_dir, processes=processes))
    with without_warnings():
        loop.train(chosen, run, console, wandb)
    return run


def _arguments(settings: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """As a command line has them."""
    if not isinstance(settings, Mapping):
        return list(settings)
    return [
        f"--config.{name.removeprefix('config.')}={'none' if value is None else value}"
        for name, value in settings.items()
    ]


def evaluate(
    workdir: str | Path,
    *,
    checkpoint: str | int = "best",
    data: str = "",
    data_dir: str = "",
    split: str = "test",
    beam_size: int | None = None,
    length_penalty: float | None = None,
    batch_size: int | None = None,
    words: "Words | None" = None,
    meteor: bool = True,
    spice: bool = False,
    spice_jars: str = "",
    clipscore: "str | ClipScorer" = "",
    clip_tokenizer: str = "",
    output: str | Path = "",
    overwrite: bool = False,
    console: Console | None = None,
) -> "Evaluation | None":
    """Caption a split of a data set by a run's checkpoint, and score it; `clipcap evaluate` is the same.

    Args:
      workdir: the run's folder.
      checkpoint: "best" (by CIDEr on the validation pictures), "latest" or a step.
      data, data_dir: a prepared data set, and where it lies; "": as in training.
      split: the split to caption; a part of it as in "test[:100]".
      beam_size, length_penalty, batch_size, words: None: as the run's config says, under `evaluate`.
      meteor, spice: METEOR where Java is there, and SPICE; `spice_jars`: see `metrics.SpiceConfig`.
      clipscore, clip_tokenizer: CLIPScore by this CLIP: see `evaluation.clipscore.ClipScorer.load`; or one.
      output: a folder for the results; "": one of its own in <workdir>/evaluations.
      overwrite: replace results that are there.
      console: where progress and scores are shown, as `progress.screen` makes one; None: on the screen.

    Returns:
      The scores, `scores.overall`, with captions and losses, which the folder holds too; None where the split has no
      references.

    Raises:
      HasResults: the folder holds some.
      UserError: there is no such checkpoint or split, or what a score needs is missing.
    """
    from clipcap_jax import cluster
    from clipcap_jax.captioning.captioner import Captioner
    from clipcap_jax.captioning.settings import check_count
    from clipcap_jax.checkpoints import store
    from clipcap_jax.evaluation import evaluate as evaluation
    from clipcap_jax.evaluation.clipscore import ClipScorer
    from clipcap_jax.metrics import SpiceConfig, unavailable

    for name, count in (("beam_size", beam_size), ("batch_size", batch_size)):
        if count is not None:
            check_count(name, count)
    if length_penalty is not None and not 0 <= length_penalty < math.inf:
        raise UserError(f"length_penalty is {length_penalty}: it has to be a number from 0 on")
    run, console = store.run_folder(workdir), console or screen()
    captioner = Captioner.load(run, checkpoint)
    cluster.check_same("checkpoints", str(captioner.step))
    changed = {"beam_size": beam_size, "length_penalty": length_penalty}
    given: Any = {name: value for name, value in changed.items() if value is not None}
    captioner = captioner.with_decode(dataclasses.replace(captioner.decode, **given))
    opened = evaluation.open_data(captioner, data, split, data_dir)
    own = captioner.metadata.config.evaluate
    size, counted = batch_size or own.batch_size, words or own.words
    folder = files.place(output or run / "evaluations" / evaluation.name_of(captioner, opened, counted))
    if evaluation.is_done(opened, folder) and not overwrite:
        raise HasResults(folder)
    clip = ClipScorer.load(clipscore, clip_tokenizer) if isinstance(clipscore, str) and clipscore else clipscore
    jars = SpiceConfig(spice_jars) if spice else None
    # METEOR is computed where it can be.
    for name, reason in unavailable(meteor=False, spice=jars, words=counted).items():
        console.print(f"{name} will not be computed: {reason}", style="yellow", soft_wrap=True)
    opened = evaluation.embed_all(captioner, opened, batch_size=size, console=console)
    captions = evaluation.caption_all(captioner, opened, batch_size=size, console=console)
    if cluster.is_main():
        evaluation.write_captions(opened, captions, folder)
    if not any(opened.captions):
        console.print(
            f"{opened.name} has no references: nothing is scored. `clipcap submit` takes {folder / 'captions.json'}.",
            soft_wrap=True,
        )
        return None
    result = evaluation.evaluate(
        captioner,
        opened,
        captions,
        batch_size=size,
        words=counted,
        meteor=meteor and cluster.is_main(),
        spice=jars if cluster.is_main() else None,
        clip=clip or None,
    )
    if cluster.is_main():
        evaluation.write(result, captioner, folder, console)
    return result
