"""The `clipcap` command, and what the two scripts share with it."""

import argparse
import contextlib
import csv
import dataclasses
import glob
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from clipcap_jax.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def run_script(main: Callable[[], Any]) -> None:
    """Run a program; a `UserError` ends it with its message alone and status 2."""
    try:
        main()
    except UserError as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run_flags_script(main: Callable[[list[str]], None]) -> None:
    """Run a program that has absl flags, `ml_collections` configs among them, as `run_script` does."""

    def parse(arguments: list[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            raise UserError(str(error)) from error
        except AttributeError as error:
            # A setting that does not exist; ml_collections' own message is in the KeyError that it wraps.
            if not (error.args and isinstance(error.args[0], KeyError)):
                raise  # from the user's config file, whose line the traceback shows
            raise UserError(f"the config has no setting {error.args[0].args[0]}") from error

    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save and a restore
    run_script(lambda: app.run(main, flags_parser=parse))


def main() -> None:
    """The `clipcap` command."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a restore
    arguments = _parser().parse_args()
    run_script(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipcap", description="Caption pictures; prepare data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    caption = commands.add_parser("caption", help="caption picture files, folders of them, or a matrix of embeddings")
    caption.set_defaults(run=_caption)
    caption.add_argument("checkpoint", help="the folder of a run, which train.py wrote to, or the original's .pt file")
    caption.add_argument("inputs", nargs="+", help="pictures, folders (with all below them), globs, or one .npy matrix")
    caption.add_argument("--output", type=Path, help="write to this .jsonl or .csv file instead of the screen")
    caption.add_argument("--which", default="best", help='"best", "latest" or a step [best]')
    caption.add_argument(
        "--beam-size", type=_positive, help="hypotheses per picture, 1 for greedy [as the run's config says]"
    )
    caption.add_argument("--batch-size", type=_positive, default=64, help="pictures per step, over all devices [64]")
    caption.add_argument("--workers", type=_positive, default=4, help="threads that decode pictures [4]")

    _add_original_options(caption)

    convert = commands.add_parser("convert", help="weights and embeddings of the original ClipCap, in and out")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    incoming = directions.add_parser("from-original", help="a checkpoint of the original to a run's folder")
    incoming.set_defaults(run=_convert_from_original)
    incoming.add_argument("file", type=Path, help="the original's .pt file")
    incoming.add_argument("run_folder", type=Path, help="the folder to write, for clipcap caption and train.init_from")
    _add_original_options(incoming)
    outgoing = directions.add_parser("to-original", help="a run to a .pt file in the layout of the original's")
    outgoing.set_defaults(run=_convert_to_original)
    language_model = directions.add_parser("to-gpt2", help="a run's GPT-2 to a folder that transformers loads")
    language_model.set_defaults(run=_convert_to_gpt2)
    for command in (outgoing, language_model):
        command.add_argument("run_folder", type=Path, help="the folder of a run")
        command.add_argument("--which", default="best", help='"best", "latest" or a step [best]')
    outgoing.add_argument("file", type=Path, help="the .pt file to write")
    language_model.add_argument("folder", type=Path, help="the folder to write")
    pickled = directions.add_parser("embeddings", help="the original's embedding file to what prepare records reads")
    pickled.set_defaults(run=_convert_embeddings)
    pickled.add_argument("file", type=Path, help="the original's .pkl file")
    pickled.add_argument("--embeddings", type=Path, required=True, help="the .npy file to write")
    pickled.add_argument("--captions", type=Path, required=True, help="the .jsonl file to write")

    prepare = commands.add_parser("prepare", help="prepare a data set for training")
    kinds = prepare.add_subparsers(required=True, metavar="DATASET")
    shapes = kinds.add_parser("shapes", help="drawings of coloured shapes, made on the spot")
    shapes.set_defaults(run=_prepare_shapes)
    records = kinds.add_parser("records", help="your own pictures or embeddings, with a captions file")
    records.set_defaults(run=_prepare_records)
    records.add_argument("--name", required=True, help='the data set will be "records/<name>"')
    records.add_argument("--captions", required=True, help=".jsonl, .csv or COCO .json")
    records.add_argument("--images", help="the folder that the captions file's image names are looked up in")
    records.add_argument("--embeddings", help=".npy matrix, one row per picture")
    records.add_argument("--encoder", help="what made the embeddings, such as ViT-B/32")
    records.add_argument(
        "--split", help="the split of pictures that name none [shares drawn by a hash of the image id]"
    )
    records.add_argument("--max-skipped", type=float, default=0.01, help="share of pictures that may be bad [0.01]")
    for command in (shapes, records):
        command.add_argument("--data-dir", default="data", help="where prepared data sets lie [data]")
    return parser


def _add_original_options(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("what a .pt file of the original does not say about itself")
    options.add_argument(
        "--published",
        help="one of the checkpoints that the original's README links to: coco-mlp, conceptual-mlp, coco-transformer",
    )
    options.add_argument(
        "--clip",
        help="weights of the tower it was trained with: a file, a folder or a name on the Hugging Face hub; "
        '"none": it will caption embeddings [as published]',
    )
    options.add_argument("--normalize", action="store_true", help="it was trained with --normalize_prefix")
    options.add_argument("--tokenizer", help="a folder or a name on the Hugging Face hub [gpt2]")
    options.add_argument("--mapper-heads", type=_positive, help="of a transformer mapper [8]")
    options.add_argument("--gpt2-heads", type=_positive, help="of its GPT-2 [the width over 64]")
    options.add_argument("--clip-heads", type=_positive, help="of the tower [as its config says, or the width over 64]")


_ORIGINAL_OPTIONS = ("published", "clip", "normalize", "tokenizer", "mapper_heads", "gpt2_heads", "clip_heads")


def _load_original(file: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Metadata and parameters of the original's file."""
    from clipcap_jax.convert import gpt2, original
    from clipcap_jax.convert.assemble import PUBLISHED, Published, from_original

    if arguments.published:
        if arguments.published not in PUBLISHED:
            raise UserError(f"--published {arguments.published} is none of {', '.join(PUBLISHED)}")
        if arguments.normalize:
            raise UserError("--normalize is known of published checkpoints: leave it out")
        published = PUBLISHED[arguments.published]
    elif arguments.clip:
        published = Published("", "", arguments.normalize)
    else:
        raise UserError(
            f"{file} does not say which CLIP it was trained with: give --published (coco-mlp, conceptual-mlp or "
            "coco-transformer) or --clip"
        )
    if arguments.clip:
        published = dataclasses.replace(published, clip="" if arguments.clip == "none" else arguments.clip)
    return from_original(
        file,
        published,
        arguments.tokenizer or gpt2.OPENAI,
        mapper_heads=arguments.mapper_heads or original.HEADS,
        gpt2_heads=arguments.gpt2_heads,
        clip_heads=arguments.clip_heads,
    )


def _convert_from_original(arguments: argparse.Namespace) -> None:
    from clipcap_jax import checkpoint

    if arguments.run_folder.exists():
        raise UserError(f"{arguments.run_folder} is there already: name another folder")
    metadata, params = _load_original(arguments.file, arguments)
    with contextlib.closing(checkpoint.Checkpoints(arguments.run_folder, keep=1)) as checkpoints:
        checkpoints.save_weights(params, metadata)
    Console().print(f"{arguments.file} is now in {arguments.run_folder}", highlight=False, soft_wrap=True)


def _load_run(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Metadata and parameters of a run."""
    from clipcap_jax import checkpoint

    with checkpoint.opened(arguments.run_folder) as checkpoints:
        step = checkpoints.find(arguments.which)
        return checkpoints.metadata(step), checkpoints.params(step)


def _convert_to_original(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.original import save_original

    metadata, params = _load_run(arguments)
    save_original(metadata.config.model, params, arguments.file)
    Console().print(f"{arguments.run_folder} is now in {arguments.file}", highlight=False, soft_wrap=True)


def _convert_to_gpt2(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.gpt2 import save_gpt2

    metadata, params = _load_run(arguments)
    save_gpt2(metadata.config.model.gpt2, params["gpt2"], metadata.tokenizer, arguments.folder)
    Console().print(f"GPT-2 and its tokenizer are now in {arguments.folder}", highlight=False, soft_wrap=True)


def _convert_embeddings(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.embeddings import convert_pickle

    pictures, captions = convert_pickle(arguments.file, arguments.embeddings, arguments.captions)
    Console().print(
        f"{pictures} pictures with {captions} captions. Next: clipcap prepare records --name NAME "
        f"--embeddings {arguments.embeddings} --captions {arguments.captions} --encoder NAME",
        highlight=False,
        soft_wrap=True,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _prepare_shapes(arguments: argparse.Namespace) -> None:
    from clipcap_jax import datasets  # importing it takes seconds, which `clipcap --help` should not

    Console().print(datasets.prepare_shapes(arguments.data_dir))


def _prepare_records(arguments: argparse.Namespace) -> None:
    from clipcap_jax import datasets

    given = {"split": arguments.split} if arguments.split else {}
    source = datasets.RecordsSource(
        name=arguments.name,
        captions=arguments.captions,
        images=arguments.images,
        embeddings=arguments.embeddings,
        encoder=arguments.encoder,
        **given,
    )
    Console().print(datasets.prepare_records(source, arguments.data_dir, arguments.max_skipped))


def find_pictures(inputs: list[str]) -> list[Path]:
    """The picture files that files, folders and globs name, each once, in order.

    Raises:
      UserError: one of them names nothing, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise UserError(f"{path} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file())
            if not files:
                raise UserError(f"there is no file, folder or glob {name!r}")
        found |= dict.fromkeys(files)
    return list(found)


def _caption(arguments: argparse.Namespace) -> None:
    from clipcap_jax import parallel
    from clipcap_jax.captioner import Captioner

    parallel.keep_compiled_programs()
    if arguments.output and arguments.output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output {arguments.output}: the name has to end in .jsonl or .csv")
    matrices = [name for name in arguments.inputs if name.endswith(".npy")]
    if matrices and len(arguments.inputs) > 1:
        raise UserError("give either pictures or one .npy matrix of embeddings, not both")
    console = Console(stderr=True)
    paths = [] if matrices else find_pictures(arguments.inputs)
    if Path(arguments.checkpoint).is_file():
        captioner = Captioner(*_load_original(Path(arguments.checkpoint), arguments), step=0)
    else:
        if given := [name for name in _ORIGINAL_OPTIONS if getattr(arguments, name)]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names}: for the original's .pt files alone, and {arguments.checkpoint} is none")
        captioner = Captioner.load(arguments.checkpoint, arguments.which)
    if arguments.beam_size:
        captioner = captioner.with_decode(dataclasses.replace(captioner.decode, beam_size=arguments.beam_size))

    results: Iterator[tuple[str, Any]]
    if matrices:
        embeddings = _load_matrix(matrices[0])
        total = len(embeddings)
        captions = captioner.caption(embeddings, arguments.batch_size)
        results = ((str(row), caption) for row, caption in enumerate(captions))
    else:
        total = len(paths)
        captioned = captioner.caption_files(paths, batch_size=arguments.batch_size, workers=arguments.workers)
        results = ((str(path), caption) for path, caption in captioned)
    results = iter(track(results, "Captioning", total=total, console=console, transient=True))
    if arguments.output:
        with _open_output(arguments.output) as file:
            skipped = _write(results, file, arguments.output.suffix)
    else:
        skipped = _show(results)
    console.print(f"{total - len(skipped)} captions, {len(skipped)} pictures skipped", highlight=False)
    for name, error in skipped[:20]:
        console.print(f"  {name}: {error}", highlight=False, markup=False, soft_wrap=True)
    if len(skipped) > 20:
        console.print(f"  ... and {len(skipped) - 20} more")
    if len(skipped) == total:
        raise UserError("none of the pictures could be read")


def _load_matrix(name: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(name, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a NumPy matrix: {error}") from error


def _open_output(path: Path) -> IO[str]:
    try:
        # POSIX file names need not be UTF-8: what is not is written as it is.
        return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


Skipped = list[tuple[str, UserError]]


def _write(results: Iterator[tuple[str, Any]], file: IO[str], suffix: str) -> Skipped:
    skipped: Skipped = []
    columns = ("image", "caption", "score", "finished")
    table = csv.DictWriter(file, columns)
    if suffix == ".csv":
        table.writeheader()
    for name, caption in results:
        if isinstance(caption, UserError):
            skipped.append((name, caption))
            continue
        row = dict(zip(columns, (name, caption.text, caption.score, caption.finished), strict=True))
        if suffix == ".csv":
            table.writerow(row)
        else:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return skipped


def _show(results: Iterator[tuple[str, Any]]) -> Skipped:
    skipped: Skipped = []
    table = Table("image", "caption")
    for name, caption in results:
        if isinstance(caption, UserError):
            skipped.append((name, caption))
        else:
            table.add_row(Text(name, overflow="fold"), Text(caption.text))
    if table.row_count:
        Console().print(table)
    return skipped
