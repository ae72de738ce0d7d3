"""`clipcap caption`."""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipcap_jax import files
from clipcap_jax.commands import arranged, decoding, journal, outputs, sidecars
from clipcap_jax.commands.cli import add_cluster_options, add_overwrite_option, positive, start_processes
from clipcap_jax.commands.convert import add_original_options, original_options
from clipcap_jax.commands.journal import Journal, Row
from clipcap_jax.commands.sidecars import Sidecars
from clipcap_jax.errors import UserError, counted
from clipcap_jax.files import check_new, place, reached
from clipcap_jax.inputs import addresses
from clipcap_jax.inputs.addresses import Picture
from clipcap_jax.inputs.folders import described, find_pictures
from clipcap_jax.progress import track

_NAMED = 20  # pictures without a caption whose reasons are shown


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    caption = commands.add_parser("caption", help="caption pictures, in files or on the web, or a matrix of embeddings")
    caption.set_defaults(run=_caption)
    caption.add_argument(
        "run_folder", help="the folder of a run, the original's .pt file, or user/name on the Hugging Face hub"
    )
    caption.add_argument(
        "inputs",
        nargs="+",
        help="pictures, folders (with all below them), globs, .tar files, http(s) addresses, @FILE or - for a list of "
        "these, one a line, or one .npy matrix",
    )
    caption.add_argument(
        "--output",
        type=place,
        help="write to this .jsonl, .csv, .json (COCO's results), .parquet or .html file, or - for JSON lines, instead "
        "of the screen; the same command goes on if it was stopped",
    )
    caption.add_argument(
        "--sidecar", metavar=".txt", help="write a text file for each picture, beside it or below the folder --output"
    )
    caption.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append", "prepend"),
        help="what becomes of a text that is there already [an error]",
    )
    caption.add_argument("--prefix", default="", help="text to put before each caption, which it does not change")
    caption.add_argument("--suffix", default="", help="text to put after each caption")
    caption.add_argument(
        "--duplicates",
        type=cosine,
        metavar="0.97",
        help="name with each picture the earliest that it nearly equals: the cosine of their embeddings is no less",
    )
    caption.add_argument(
        "--best-first", action="store_true", help="write the pictures by the scores of their captions, not as given"
    )
    caption.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    caption.add_argument("--batch-size", type=positive, default=64, help="pictures per step, over all devices [64]")
    caption.add_argument("--workers", type=positive, default=4, help="threads that fetch and decode pictures [4]")

    decoding.add_options(caption)
    add_overwrite_option(caption)
    add_cluster_options(caption)
    add_original_options(caption)


@dataclasses.dataclass
class _Tally:
    """How many captions there are, how many pictures have none, and the reasons of the first of these."""

    captions: int = 0
    skipped: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, each counted."""
        for row in rows:
            if "captions" in row:
                self.captions += len(row["captions"])
            else:
                self.skipped += 1
                self.reasons += [f"{row['image']}: {row['error']}"] * (self.skipped <= _NAMED)
            yield row


def _caption(arguments: argparse.Namespace) -> None:
    from clipcap_jax import cluster

    console = start_processes(arguments, stderr=True)
    texts, output = _target(arguments)
    inputs, others = _inputs(arguments.inputs)
    numbers: Sequence[int] = range(len(inputs))  # what is drawn depends on them
    if texts:
        texts, inputs, numbers = _to_do(texts, arguments.inputs, inputs, console)
        if not inputs:
            return
    if output:
        outputs.check_inputs(output, inputs)
    captioner = _load(arguments)
    settings = _settings(captioner, inputs, arguments)
    cluster.check_same("pictures or checkpoints", files.to_json({"step": captioner.step, **settings}))

    tally = _Tally()
    partial = output.with_name(output.name + ".partial") if output else None
    if texts and texts.existing != "skip":  # what to skip is noted by the texts themselves
        partial = texts.journal(inputs)
    with contextlib.ExitStack() as stack:
        noted = None
        if partial and cluster.is_main():
            made_from = {"checkpoint": f"step {captioner.step}, {_digest(captioner.params)}", **settings}
            noted = stack.enter_context(journal.opened(partial, made_from, anew=arguments.overwrite))
            stack.enter_context(_kept(partial, noted, console))
            collections.deque(tally.count(noted.rows()), maxlen=0)
        done = cluster.of_first(noted.done if noted else 0)
        if done:
            console.print(f"Going on after {done:,} of {counted(len(inputs), 'picture')}")
        found = _shared(captioner, inputs, arguments, done, numbers)
        bar = track(found, "Captioning", total=len(inputs), done=done, console=console, transient=True)
        rows: Iterator[Row] = stack.enter_context(contextlib.closing(bar))
        if not cluster.is_main():
            collections.deque(rows, maxlen=0)  # nothing comes out here: process 0 has them
            return
        rows = tally.count(rows)
        if texts:
            _write_texts(texts, rows, inputs[done:], noted, inputs[done - 1] if done else None)
        elif noted and output:
            collections.deque(map(noted.add, rows), maxlen=0)
            rows = noted.rows()
            if arguments.duplicates:
                rows = arranged.marked(rows, arguments.duplicates, console)
            if arguments.best_first:
                rows, inputs = arranged.best_first(rows, inputs)
            outputs.write(output, rows, inputs)
        else:
            outputs.show(rows, as_json=arguments.output is not None or not sys.stdout.isatty())
    if partial:
        with reached(partial):
            partial.unlink(missing_ok=True)
    _tell(tally, output, others, console)


def cosine(text: str) -> float:
    """For argparse: above 0, up to 1."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, up to 1")
    return number


def _target(arguments: argparse.Namespace) -> tuple[Sidecars | None, Path | None]:
    """The texts to write beside pictures, or the file; neither for the standard output."""
    to_file = not arguments.sidecar and str(arguments.output or "-") != "-"
    for option in ("duplicates", "best_first"):
        if getattr(arguments, option) and not to_file:
            raise UserError(f"--{option.replace('_', '-')} is of a file: name it with --output, and no --sidecar")
    if arguments.sidecar:
        if arguments.output and (arguments.output.suffix in outputs.SUFFIXES or str(arguments.output) == "-"):
            raise UserError(f"--output {arguments.output}: with --sidecar this names a folder on a disk")
        return sidecars.named(arguments.sidecar, arguments.existing, arguments.output), None
    if arguments.existing:
        raise UserError("--existing is of the texts that --sidecar writes: give that too")
    if arguments.output is None or str(arguments.output) == "-":
        return None, None
    outputs.check(arguments.output, arguments.n or 1, duplicates=bool(arguments.duplicates))
    check_new(arguments.output, overwrite=arguments.overwrite)
    return None, arguments.output


def _inputs(names: list[str]) -> tuple[Any, collections.Counter[str]]:
    """Paths and addresses of pictures, or a matrix of embeddings, and what lies beside the pictures."""
    matrices = [name for name in names if name.endswith(".npy") and not addresses.is_address(name)]
    if not matrices:
        return find_pictures(names)
    if len(names) > 1:
        raise UserError("give either pictures or one .npy matrix of embeddings, not both")
    return _load_matrix(matrices[0]), collections.Counter()


def _to_do(
    texts: Sidecars, names: list[str], inputs: Any, console: Console
) -> tuple[Sidecars, list[Path], Sequence[int]]:
    """The pictures that need a text, and which of all they are."""
    if not all(isinstance(picture, Path) for picture in inputs):
        raise UserError(
            "--sidecar is for pictures on a disk, not for embeddings or addresses: name a file with --output alone"
        )
    texts = sidecars.below(texts, names, inputs)
    texts.check(inputs)
    if texts.existing != "skip":
        return texts, inputs, range(len(inputs))
    missing = texts.missing(inputs)
    console.print(
        f"{counted(len(inputs) - len(missing), 'picture')} of {len(inputs):,} skipped: they have a text already"
    )
    number_of = {picture: number for number, picture in enumerate(inputs)}
    return texts, missing, [number_of[picture] for picture in missing]


def _load(arguments: argparse.Namespace) -> Any:
    from clipcap_jax.captioning.captioner import Captioner

    original = original_options(arguments)
    if original and not Path(arguments.run_folder).is_file():
        names = ", ".join(f"--{name.replace('_', '-')}" for name in original)
        raise UserError(f"{names}: for the original's .pt files alone, and {arguments.run_folder} is none")
    return Captioner.load(arguments.run_folder, arguments.checkpoint, local=True, **original)


def _settings(captioner: Any, inputs: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All but the checkpoint that decides what is written."""
    digest = hashlib.sha256()
    for part in inputs:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else f"{part}\n".encode(errors="surrogateescape"))
    settings = {"pictures": f"{len(inputs):,} ({digest.hexdigest()[:16]})", "n": 1}
    settings |= dataclasses.asdict(captioner.decode) | decoding.asked(arguments)
    if arguments.duplicates:  # from what cosine on is asked only in the end
        settings["duplicates"] = True
    return settings | {name: getattr(arguments, name) for name in ("prefix", "suffix", "existing")}


def _digest(params: Any) -> str:
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _kept(partial: Path, noted: Journal, console: Console) -> Iterator[None]:
    """Where what is done here is ended, say where that is kept, if it is anything."""
    try:
        yield
    except BaseException:
        if noted.done:
            console.print(f"What is done is in {partial}: the same command goes on from there", soft_wrap=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _write_texts(
    texts: Sidecars, rows: Iterator[Row], paths: Sequence[Path], noted: Journal | None, last: Path | None
) -> None:
    """Write the texts, each noted first; that of the `last` picture noted may be missing, if the process was killed."""
    texts.check_new(paths)
    if noted and last:
        *_, row = noted.rows()
        if "captions" in row:
            texts.write(last, _texts(row), again=True)
    for path, row in zip(paths, rows, strict=True):
        if noted:
            noted.add(row)
        if "captions" in row:
            texts.write(path, _texts(row))


def _texts(row: Row) -> list[str]:
    return [caption["caption"] for caption in row["captions"]]


def _tell(tally: _Tally, output: Path | None, others: collections.Counter[str], console: Console) -> None:
    console.print(f"{counted(tally.captions, 'caption')}, {counted(tally.skipped, 'picture')} skipped")
    for reason in tally.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    if tally.skipped > _NAMED:
        console.print(f"  ... and {tally.skipped - _NAMED:,} more")
    if others:
        console.print(f"Not looked at: {described(others)}", soft_wrap=True)
    if output:
        console.print(f"written: {output}", soft_wrap=True)
    if tally.skipped and not tally.captions:
        raise UserError("none of the pictures could be read")


def _shared(
    captioner: Any, inputs: Any, arguments: argparse.Namespace, done: int, numbers: Sequence[int]
) -> Iterator[Row]:
    """The rows, in order, on process 0; of n processes each makes those of every n-th batch.

    Args:
      captioner: a local one.
      inputs: paths and addresses of pictures, or a matrix of embeddings.
      arguments: the batch size over all processes, the threads of each that decode, what is asked of captions, and
        texts around them.
      done: how many of the inputs are left out.
      numbers: of the inputs, which stay the same in whatever parts they are captioned.
    """
    from clipcap_jax import cluster, parallel

    size = parallel.round_up(max(1, -(-min(arguments.batch_size, len(inputs) - done) // cluster.count())), local=True)
    rounds = range(done, len(inputs), size * cluster.count())
    mine = [range(len(inputs))[start + cluster.index() * size :][:size] for start in rounds]
    if isinstance(inputs, np.ndarray):
        captioner.reader.check_embeddings(inputs)  # all, before the first is captioned
    order = list(itertools.chain(*mine))
    captions = zip(
        order if isinstance(inputs, np.ndarray) else [inputs[row] for row in order],
        captioner.caption(
            (inputs[row] for row in order),
            rows=[numbers[row] for row in order],
            batch_size=size,
            workers=arguments.workers,
            stream=True,
            errors="return",
            embeddings=bool(arguments.duplicates),
            **{"n": 1, **decoding.asked(arguments)},
        ),
        strict=True,
    )

    def row(name: Picture | int, found: Any) -> Row:
        embedding = None
        if arguments.duplicates and not isinstance(found, UserError):
            found, embedding = found
        made = outputs.row(name, found, arguments.prefix, arguments.suffix)
        return made if embedding is None else arranged.with_embedding(made, embedding)

    told = ([row(name, found) for name, found in itertools.islice(captions, len(rows))] for rows in mine)
    yield from itertools.chain.from_iterable(cluster.collect(told))


def _load_matrix(name: str) -> np.ndarray:
    try:
        matrix = np.lib.format.open_memmap(name, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a NumPy matrix: {error}") from error
    if not matrix.ndim:
        raise UserError(f"{name} is not a NumPy matrix, but holds a single number")
    return matrix
