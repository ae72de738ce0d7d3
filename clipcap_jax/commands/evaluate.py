"""`clipcap evaluate`, which `evaluate.py` is too."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from clipcap_jax import files
from clipcap_jax.commands.cli import (
    add_cluster_options,
    add_overwrite_option,
    positive,
    spellings,
    start_processes,
)
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import SpiceConfig, unavailable, words

if TYPE_CHECKING:
    from clipcap_jax.evaluation.clipscore import ClipScorer

# Seconds between looks at a run that is followed.
_PATIENCE = 5.0


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    evaluate = commands.add_parser("evaluate", help="caption a split of a data set by a run's checkpoint, and score it")
    evaluate.set_defaults(run=_run)
    evaluate.add_argument("--workdir", default="runs/shapes", help="the run's folder [runs/shapes]")
    evaluate.add_argument(
        "--checkpoint", default="best", help='"best" (by CIDEr on the validation pictures), "latest" or a step [best]'
    )
    evaluate.add_argument(
        "--follow", action="store_true", help="score each new checkpoint as it comes, until the run has ended"
    )
    evaluate.add_argument("--data", default="", help="a prepared data set [the one it was trained on]")
    evaluate.add_argument(*spellings("data_dir"), default="", help="where data sets are prepared [as in training]")
    evaluate.add_argument("--split", default="test", help="the split to caption; a part of it as in test[:100] [test]")
    evaluate.add_argument(
        *spellings("beam_size"), type=positive, help="hypotheses per picture, 1 for greedy [as the run's config says]"
    )
    evaluate.add_argument(
        *spellings("length_penalty"),
        type=float,
        help="captions are ranked by log-probability / length ** this [as there]",
    )
    evaluate.add_argument(
        *spellings("batch_size"), type=positive, help="pictures per step, over all devices [as there]"
    )
    evaluate.add_argument("--words", choices=words.NAMED, help="what scores count as a word [as there]")
    evaluate.add_argument(
        "--meteor", action=argparse.BooleanOptionalAction, default=True, help="METEOR as well, where Java is there"
    )
    evaluate.add_argument("--nometeor", dest="meteor", action="store_false", help=argparse.SUPPRESS)
    evaluate.add_argument("--spice", action="store_true", help="SPICE as well, which needs Java, and minutes")
    evaluate.add_argument(
        *spellings("spice_jars"), default="", help="the folder with Stanford CoreNLP 3.6.0, Nashorn and ASM"
    )
    evaluate.add_argument(
        "--clipscore", default="", metavar="WEIGHTS", help="CLIPScore as well, by this CLIP: a file, folder or hub name"
    )
    evaluate.add_argument(
        *spellings("clip_tokenizer"), default="", help="CLIP's: a file, folder or hub name [beside its weights]"
    )
    evaluate.add_argument(
        "--output", default="", help="folder for the results [one of its own in <workdir>/evaluations]"
    )
    add_overwrite_option(evaluate)
    add_cluster_options(evaluate)


def _run(arguments: argparse.Namespace) -> None:
    from clipcap_jax import cluster
    from clipcap_jax.checkpoints import store

    console, workdir = start_processes(arguments), store.run_folder(arguments.workdir)
    load_clip = functools.cache(lambda: _load_clip(arguments))  # once for all checkpoints that are followed
    if not arguments.follow:
        _evaluate(arguments, console, workdir, arguments.checkpoint, load_clip)
        return
    if cluster.joined():
        raise UserError("--follow works in one process, beside the training: start it so")
    with console.status(Text(f"Waiting for a run in {workdir}")):
        while not store.has_checkpoints(workdir):
            time.sleep(_PATIENCE)
    with store.opened(workdir) as checkpoints:
        done, ended = -1, False
        while not ended:
            step = next((step for step in checkpoints.steps() if step > done), None)
            if step is None:
                time.sleep(_PATIENCE)
                continue
            done = step
            console.rule(f"step {step}")
            try:
                ended = checkpoints.is_last(step)
                _evaluate(arguments, console, workdir, str(step), load_clip)
            except UserError:
                if step in checkpoints.steps():
                    raise
                console.print(f"The run has dropped step {step} for newer ones.")


def _load_clip(arguments: argparse.Namespace) -> "ClipScorer | None":
    from clipcap_jax.evaluation.clipscore import ClipScorer

    return ClipScorer.load(arguments.clipscore, arguments.clip_tokenizer) if arguments.clipscore else None


def _evaluate(
    arguments: argparse.Namespace,
    console: Console,
    workdir: Path,
    which: str,
    load_clip: Callable[[], "ClipScorer | None"],
) -> None:
    from clipcap_jax import cluster
    from clipcap_jax.captioning.captioner import Captioner
    from clipcap_jax.evaluation import evaluate

    captioner = Captioner.load(workdir, which)
    cluster.check_same("checkpoints", str(captioner.step))
    decode = captioner.decode
    if arguments.beam_size:
        decode = dataclasses.replace(decode, beam_size=arguments.beam_size)
    if arguments.length_penalty is not None:
        decode = dataclasses.replace(decode, length_penalty=arguments.length_penalty)
    captioner = captioner.with_decode(decode)
    data = evaluate.open_data(captioner, arguments.data, arguments.split, arguments.data_dir)
    batch_size = arguments.batch_size or captioner.metadata.config.evaluate.batch_size
    counted: Any = arguments.words or captioner.metadata.config.evaluate.words
    folder = files.place(arguments.output or workdir / "evaluations" / evaluate.name_of(captioner, data, counted))
    if evaluate.is_done(data, folder) and not arguments.overwrite:
        if not arguments.follow:
            raise UserError(f"{folder} holds results: name another folder by --output, or replace them by --overwrite")
        console.print(f"{folder} holds results already", soft_wrap=True)
        return
    clip = load_clip()
    spice = SpiceConfig(arguments.spice_jars) if arguments.spice else None
    # METEOR is computed where it can be.
    for name, reason in unavailable(meteor=False, spice=spice, words=counted).items():
        console.print(f"{name} will not be computed: {reason}", style="yellow", soft_wrap=True)
    data = evaluate.embed_all(captioner, data, batch_size=batch_size, console=console)
    captions = evaluate.caption_all(captioner, data, batch_size=batch_size, console=console)
    if cluster.is_main():
        evaluate.write_captions(data, captions, folder)
    if not any(data.captions):
        console.print(
            f"{data.name} has no references: nothing is scored. `clipcap submit` takes {folder / 'captions.json'}.",
            soft_wrap=True,
        )
        return
    result = evaluate.evaluate(
        captioner,
        data,
        captions,
        batch_size=batch_size,
        words=counted,
        meteor=arguments.meteor and cluster.is_main(),
        spice=spice if cluster.is_main() else None,
        clip=clip,
    )
    if cluster.is_main():
        evaluate.write(result, captioner, folder, console)
