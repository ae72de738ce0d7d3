"""`clipcap caption`."""

import argparse
import collections
import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipcap_jax.commands.cli import add_cluster_options, add_overwrite_option, positive, start_processes
from clipcap_jax.commands.convert import ORIGINAL_OPTIONS, add_original_options, load_original
from clipcap_jax.errors import UserError
from clipcap_jax.files import check_new, on_disk, place, to_json
from clipcap_jax.inputs.folders import described, find_pictures
from clipcap_jax.progress import screen, track


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    caption = commands.add_parser("caption", help="caption picture files, folders of them, or a matrix of embeddings")
    caption.set_defaults(run=_caption)
    caption.add_argument("run_folder", help="the folder of a run, which train.py wrote to, or the original's .pt file")
    caption.add_argument("inputs", nargs="+", help="pictures, folders (with all below them), globs, or one .npy matrix")
    caption.add_argument("--output", type=place, help="write to this .jsonl or .csv file instead of the screen")
    caption.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    caption.add_argument(
        "--beam-size", type=positive, help="hypotheses per picture, 1 for greedy [as the run's config says]"
    )
    caption.add_argument("--batch-size", type=positive, default=64, help="pictures per step, over all devices [64]")
    caption.add_argument("--workers", type=positive, default=4, help="threads that decode pictures [4]")

    add_overwrite_option(caption)
    add_cluster_options(caption)
    add_original_options(caption)


def _caption(arguments: argparse.Namespace) -> None:
    from clipcap_jax import cluster
    from clipcap_jax.captioning.captioner import Captioner

    console = start_processes(arguments, stderr=True)
    if arguments.output and arguments.output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output {arguments.output}: the name has to end in .jsonl or .csv")
    if arguments.output:
        check_new(arguments.output, _partial(arguments.output), overwrite=arguments.overwrite)
    matrices = [name for name in arguments.inputs if name.endswith(".npy")]
    if matrices and len(arguments.inputs) > 1:
        raise UserError("give either pictures or one .npy matrix of embeddings, not both")
    paths, others = find_pictures([] if matrices else arguments.inputs)
    if Path(arguments.run_folder).is_file():
        captioner = Captioner(*load_original(Path(arguments.run_folder), arguments), step=0, local=True)
    else:
        if given := [name for name in ORIGINAL_OPTIONS if getattr(arguments, name)]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names}: for the original's .pt files alone, and {arguments.run_folder} is none")
        captioner = Captioner.load(arguments.run_folder, arguments.checkpoint, local=True)
    if arguments.beam_size:
        captioner = captioner.with_decode(dataclasses.replace(captioner.decode, beam_size=arguments.beam_size))

    inputs: Any = _load_matrix(matrices[0]) if matrices else paths
    total = len(inputs)
    seen = "\n".join(map(str, paths)) or str(inputs.shape)
    cluster.check_same("pictures or checkpoints", f"{captioner.step} {seen}")
    results: Iterator[tuple[str, Any]] = _shared(captioner, inputs, arguments.batch_size, arguments.workers)
    results = iter(track(results, "Captioning", total=total, console=console, transient=True))
    if not cluster.is_main():
        collections.deque(results, maxlen=0)  # nothing comes out here: process 0 has them
        return
    skipped = _write(results, arguments.output, console) if arguments.output else _show(results)
    console.print(f"{total - len(skipped)} captions, {len(skipped)} pictures skipped")
    for name, error in skipped[:20]:
        console.print(f"  {name}: {error}", soft_wrap=True)
    if len(skipped) > 20:
        console.print(f"  ... and {len(skipped) - 20} more")
    if others:
        console.print(f"Not looked at: {described(others)}", soft_wrap=True)
    if len(skipped) == total:
        raise UserError("none of the pictures could be read")


def _shared(captioner: Any, inputs: Any, batch_size: int, workers: int) -> Iterator[tuple[str, Any]]:
    """Captions, or errors in their place, by name, in order, on process 0; of n processes each makes every n-th batch.

    Args:
      captioner: a local one.
      inputs: paths of pictures, or a matrix of embeddings.
      batch_size: over all processes.
      workers: threads of each that decode.
    """
    from clipcap_jax import cluster, parallel
    from clipcap_jax.captioning.captioner import Caption

    size = parallel.round_up(max(1, -(-min(batch_size, len(inputs)) // cluster.count())), local=True)
    rounds = range(0, len(inputs), size * cluster.count())
    mine = [range(len(inputs))[start + cluster.index() * size :][:size] for start in rounds]
    if isinstance(inputs, np.ndarray):
        captioner.reader.check_embeddings(inputs)  # all, before the first is captioned
    order = list(itertools.chain(*mine))
    captions = zip(
        order if isinstance(inputs, np.ndarray) else [inputs[row] for row in order],
        captioner.caption(
            (inputs[row] for row in order), batch_size=size, workers=workers, stream=True, errors="return"
        ),
        strict=True,
    )
    told = ([_told(*item) for item in itertools.islice(captions, len(rows))] for rows in mine)
    for name, found in itertools.chain.from_iterable(cluster.collect(told)):
        yield name, Caption(**found) if isinstance(found, dict) else UserError(found)


def _told(name: Path | int, caption: Any) -> tuple[str, Any]:
    """As a process tells it to another."""
    if not isinstance(caption, UserError) and not math.isfinite(caption.score):
        caption = UserError("no caption has a finite score: the weights or the embedding lead beyond the numbers")
    return str(name), str(caption) if isinstance(caption, UserError) else dataclasses.asdict(caption)


def _load_matrix(name: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(name, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a NumPy matrix: {error}") from error


def _partial(path: Path) -> Path:
    """Where what was captioned until an interrupt stays."""
    return path.with_name(path.name + ".partial")


Skipped = list[tuple[str, UserError]]


def _write(results: Iterator[tuple[str, Any]], path: Path, console: Console) -> Skipped:
    skipped: Skipped = []
    columns = ("image", "caption", "score", "finished")
    partial = _partial(path)
    try:
        # POSIX file names need not be UTF-8: what is not is written to a .csv as it is.
        with (
            on_disk(partial) as here,
            here.open("w", 1, encoding="utf-8", errors="surrogateescape", newline="") as file,  # line by line
        ):
            table = csv.DictWriter(file, columns)
            if path.suffix == ".csv":
                table.writeheader()
            for name, caption in results:
                if isinstance(caption, UserError):
                    skipped.append((name, caption))
                    continue
                row = dict(zip(columns, (name, caption.text, caption.score, caption.finished), strict=True))
                if path.suffix == ".csv":
                    table.writerow(row)
                else:
                    file.write(to_json(row) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    except BaseException:
        console.print(f"The captions so far are in {partial}", soft_wrap=True)
        raise
    return skipped


def _show(results: Iterator[tuple[str, Any]]) -> Skipped:
    skipped: Skipped = []
    table = Table("image", "caption")
    try:
        for name, caption in results:
            if isinstance(caption, UserError):
                skipped.append((name, caption))
            else:
                table.add_row(Text(name, overflow="fold"), Text(caption.text))
    finally:  # after an interrupt, those that there are
        if table.row_count:
            screen().print(table)
    return skipped
