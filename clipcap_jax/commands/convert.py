"""`clipcap convert`, and what the commands that read the original's files share."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from clipcap_jax.commands.cli import add_overwrite_option, positive
from clipcap_jax.errors import UserError
from clipcap_jax.files import check_new
from clipcap_jax.progress import screen


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    convert = commands.add_parser("convert", help="weights and embeddings of the original ClipCap, in and out")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    incoming = directions.add_parser("from-original", help="a checkpoint of the original to a run's folder")
    incoming.set_defaults(run=_convert_from_original)
    incoming.add_argument("file", type=Path, help="the original's .pt file")
    incoming.add_argument("run_folder", help="the folder to write, for clipcap caption and train.init_from")
    add_original_options(incoming)
    outgoing = directions.add_parser("to-original", help="a run to a .pt file in the layout of the original's")
    outgoing.set_defaults(run=_convert_to_original)
    language_model = directions.add_parser("to-gpt2", help="a run's GPT-2 to a folder that transformers loads")
    language_model.set_defaults(run=_convert_to_gpt2)
    for command in (outgoing, language_model):
        command.add_argument("run_folder", help="the folder of a run")
        command.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    outgoing.add_argument("file", type=Path, help="the .pt file to write")
    add_overwrite_option(outgoing)
    language_model.add_argument("folder", type=Path, help="the folder to write")
    pickled = directions.add_parser("embeddings", help="the original's embedding file to what prepare records reads")
    pickled.set_defaults(run=_convert_embeddings)
    pickled.add_argument("file", type=Path, help="the original's .pkl file")
    pickled.add_argument("--embeddings", type=Path, required=True, help="the .npy file to write")
    pickled.add_argument("--captions", type=Path, required=True, help="the .jsonl file to write")
    add_overwrite_option(pickled)


def add_original_options(command: argparse.ArgumentParser) -> None:
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
    options.add_argument("--mapper-heads", type=positive, help="of a transformer mapper [8]")
    options.add_argument("--gpt2-heads", type=positive, help="of its GPT-2 [the width over 64]")
    options.add_argument("--clip-heads", type=positive, help="of the tower [as its config says, or the width over 64]")


_ORIGINAL = ("published", "clip", "normalize", "tokenizer", "mapper_heads", "gpt2_heads", "clip_heads")


def load_original(file: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Metadata and parameters of the original's file."""
    from clipcap_jax.convert.assemble import open_original

    return open_original(file, **{name: getattr(arguments, name) for name in _ORIGINAL})


def original_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_original_options` that are given."""
    return {name: value for name in _ORIGINAL if (value := getattr(arguments, name))}


def check_new_folder(folder: Path) -> None:
    """Raise a UserError if there is anything of this name."""
    if folder.exists():
        raise UserError(f"{folder} is there already: name another folder")


def write_run(folder: Path, metadata: Any, params: Any) -> None:
    """Write a run's folder for weights that it did not train."""
    from clipcap_jax.checkpoints import settings, store

    with contextlib.closing(store.Checkpoints(folder, keep=1)) as checkpoints:
        checkpoints.save_weights(params, metadata)
    settings.write(folder, metadata.config)


def _convert_from_original(arguments: argparse.Namespace) -> None:
    from clipcap_jax.checkpoints import store

    folder = store.run_folder(arguments.run_folder)
    check_new_folder(folder)
    write_run(folder, *load_original(arguments.file, arguments))
    screen().print(f"{arguments.file} is now in {folder}", soft_wrap=True)


def load_run(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Metadata and parameters of a run."""
    from clipcap_jax.checkpoints import store

    with store.opened(arguments.run_folder) as checkpoints:
        step = checkpoints.find(arguments.checkpoint)
        return checkpoints.metadata(step), checkpoints.params(step)


def _convert_to_original(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.original import save_original

    check_new(arguments.file, overwrite=arguments.overwrite)
    metadata, params = load_run(arguments)
    save_original(metadata.config.model, params, arguments.file)
    screen().print(f"{arguments.run_folder} is now in {arguments.file}", soft_wrap=True)
    if "clip" in metadata.config.train.trainable:
        told = "The vision tower, which was trained too, is not: the original's files hold none, and use OpenAI's."
        screen().print(told, style="yellow", soft_wrap=True)


def _convert_to_gpt2(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.gpt2 import save_gpt2

    check_new_folder(arguments.folder)
    metadata, params = load_run(arguments)
    save_gpt2(metadata.config.model.gpt2, params["gpt2"], metadata.tokenizer, arguments.folder)
    screen().print(f"GPT-2 and its tokenizer are now in {arguments.folder}", soft_wrap=True)


def _convert_embeddings(arguments: argparse.Namespace) -> None:
    from clipcap_jax.convert.embeddings import convert_pickle

    check_new(arguments.embeddings, arguments.captions, overwrite=arguments.overwrite)
    pictures, captions = convert_pickle(arguments.file, arguments.embeddings, arguments.captions)
    screen().print(
        f"{pictures} pictures with {captions} captions. Next: clipcap prepare records --name NAME "
        f"--embeddings {arguments.embeddings} --captions {arguments.captions} --encoder NAME",
        soft_wrap=True,
    )
