"""`clipcap evaluate`, which `evaluate.py` is too."""

import argparse
import functools
import time
from typing import Any

from rich.text import Text

from clipcap_jax import jobs
from clipcap_jax.commands.cli import (
    add_cluster_options,
    add_overwrite_option,
    positive,
    spellings,
    start_processes,
)
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import words

# Of `jobs.evaluate`, which are options of the same names.
_OPTIONS = (
    *("data", "data_dir", "split", "beam_size", "length_penalty", "batch_size", "words", "meteor", "spice"),
    *("spice_jars", "clipscore", "clip_tokenizer", "output", "overwrite"),
)
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
    from clipcap_jax.evaluation.clipscore import ClipScorer

    console, workdir = start_processes(arguments), store.run_folder(arguments.workdir)
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    score = functools.partial(jobs.evaluate, workdir, console=console, **options)
    if not arguments.follow:
        score(checkpoint=arguments.checkpoint)
        return
    if cluster.joined():
        raise UserError("--follow works in one process, beside the training: start it so")
    if arguments.clipscore:  # once for all checkpoints
        score = functools.partial(score, clipscore=ClipScorer.load(arguments.clipscore, arguments.clip_tokenizer))
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
                score(checkpoint=step)
            except jobs.HasResults as found:
                console.print(f"{found.folder} holds results already", soft_wrap=True)
            except UserError:
                if step in checkpoints.steps():
                    raise
                console.print(f"The run has dropped step {step} for newer ones.")
