"""Score a trained captioner: `python evaluate.py --workdir=runs/shapes --split=test`.

Works beside a training run: `--follow` scores each new checkpoint as it comes.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from clipcap_jax import cluster, files
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.checkpoints import store
from clipcap_jax.commands import cli
from clipcap_jax.errors import UserError
from clipcap_jax.evaluation import evaluate
from clipcap_jax.evaluation.clipscore import ClipScorer
from clipcap_jax.metrics import SpiceConfig, unavailable, words

_WORKDIR = flags.DEFINE_string("workdir", "runs/shapes", "the run's folder, which train.py wrote to")
_WHICH = flags.DEFINE_string("checkpoint", "best", '"best" (by CIDEr on the validation pictures), "latest" or a step')
_FOLLOW = flags.DEFINE_bool("follow", False, "score each new checkpoint as it comes, until the run has ended")
_DATA = flags.DEFINE_string("data", "", "a prepared data set [the one it was trained on]")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "where data sets are prepared [as in training]")
_SPLIT = flags.DEFINE_string("split", "test", "the split to caption; a part of it as in test[:100]")
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 0, "hypotheses per picture, 1 for greedy [as the run's config says]", 0)
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", None, "see decode.DecodeConfig [as the run's config says]")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "pictures per step, over all devices [as the run's config says]", 0)
_WORDS = flags.DEFINE_enum("words", None, words.NAMED, "what scores count as a word [as the run's config says]")
_METEOR = flags.DEFINE_bool("meteor", True, "METEOR as well, where Java and pycocoevalcap are there")
_SPICE = flags.DEFINE_bool("spice", False, "SPICE as well, which needs Java, and minutes")
_SPICE_JARS = flags.DEFINE_string("spice_jars", "", "the folder with Stanford CoreNLP 3.6.0, Nashorn and ASM")
_CLIPSCORE = flags.DEFINE_string("clipscore", "", "CLIPScore as well, by this CLIP: a file, a folder or a hub name")
_CLIP_TOKENIZER = flags.DEFINE_string("clip_tokenizer", "", "CLIP's: a file, folder or hub name [beside its weights]")
_OUTPUT = flags.DEFINE_string("output", "", "folder for the results [one of its own in <workdir>/evaluations]")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the results of the same evaluation if they are there")
cli.define_cluster_flags()

# Seconds between looks at a run that is followed.
_PATIENCE = 5.0


@functools.cache
def _clip() -> ClipScorer | None:
    return ClipScorer.load(_CLIPSCORE.value, _CLIP_TOKENIZER.value) if _CLIPSCORE.value else None


def _evaluate(console: Console, workdir: Path, which: str) -> None:
    captioner = Captioner.load(workdir, which)
    cluster.check_same("checkpoints", str(captioner.step))
    decode = captioner.decode
    if _BEAM_SIZE.value:
        decode = dataclasses.replace(decode, beam_size=_BEAM_SIZE.value)
    if _LENGTH_PENALTY.value is not None:
        decode = dataclasses.replace(decode, length_penalty=_LENGTH_PENALTY.value)
    captioner = captioner.with_decode(decode)
    data = evaluate.open_data(captioner, _DATA.value, _SPLIT.value, _DATA_DIR.value)
    batch_size = _BATCH_SIZE.value or captioner.metadata.config.evaluate.batch_size
    counted: Any = _WORDS.value or captioner.metadata.config.evaluate.words
    folder = files.place(_OUTPUT.value or workdir / "evaluations" / evaluate.name_of(captioner, data, counted))
    if evaluate.is_done(data, folder) and not _OVERWRITE.value:
        if not _FOLLOW.value:
            raise UserError(f"{folder} holds results: name another folder by --output, or replace them by --overwrite")
        console.print(f"{folder} holds results already", soft_wrap=True)
        return
    clip = _clip()
    spice = SpiceConfig(_SPICE_JARS.value) if _SPICE.value else None
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
        meteor=_METEOR.value and cluster.is_main(),
        spice=spice if cluster.is_main() else None,
        clip=clip,
    )
    if cluster.is_main():
        evaluate.write(result, captioner, folder, console)


def main(_: list[str]) -> None:
    console, workdir = cli.start_processes(flags.FLAGS), store.run_folder(_WORKDIR.value)
    if not _FOLLOW.value:
        _evaluate(console, workdir, _WHICH.value)
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
                _evaluate(console, workdir, str(step))
            except UserError:
                if step in checkpoints.steps():
                    raise
                console.print(f"The run has dropped step {step} for newer ones.")


if __name__ == "__main__":
    cli.run_flags_script(main)
