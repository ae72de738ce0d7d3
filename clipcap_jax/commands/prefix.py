"""`clipcap prefix`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from clipcap_jax import files
from clipcap_jax.commands.cli import add_overwrite_option, positive
from clipcap_jax.commands.convert import add_original_options, original_options
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import addresses
from clipcap_jax.progress import screen

if TYPE_CHECKING:
    from clipcap_jax.captioning.captioner import Caption
    from clipcap_jax.captioning.insight import Word


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    prefix = commands.add_parser("prefix", help="the prefix of a picture in words: those nearest to its vectors")
    prefix.set_defaults(run=_prefix)
    prefix.add_argument("run_folder", help="the folder of a run, or the original's .pt file")
    prefix.add_argument("picture", type=addresses.picture, help="a picture's file, or its address on the web")
    prefix.add_argument("--output", type=files.place, help="also write a page with the picture to this .html file")
    prefix.add_argument("--words", type=positive, default=5, help="of each vector [5]")
    prefix.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    add_overwrite_option(prefix)
    add_original_options(prefix)


def _prefix(arguments: argparse.Namespace) -> None:
    from clipcap_jax import parallel
    from clipcap_jax.captioning.captioner import Captioner

    parallel.keep_compiled_programs()
    picture, output = arguments.picture, arguments.output
    if output:
        if output.suffix != ".html":
            raise UserError(f"--output {output}: the name has to end in .html")
        files.check_new(output, overwrite=arguments.overwrite)
    captioner = Captioner.load(arguments.run_folder, arguments.checkpoint, local=True, **original_options(arguments))
    caption = captioner.caption(picture)
    words = captioner.prefix_words(picture, arguments.words)
    console = screen()
    console.print(caption.text, soft_wrap=True)
    console.print(_table(words))
    if output:
        _write_page(output, picture, caption, words)
        console.print(f"written: {output}", soft_wrap=True)


def _table(words: "list[list[Word]]") -> Table:
    table = Table("vector", "nearest words, with their cosines")
    for number, row in enumerate(words, 1):
        table.add_row(str(number), Text(", ".join(f"{word.text!r} {word.similarity:.2f}" for word in row)))
    return table


def _write_page(output: Path, picture: addresses.Picture, caption: "Caption", words: "list[list[Word]]") -> None:
    from clipcap_jax import pages

    name = Path(picture).name
    try:
        shown = pages.picture(addresses.read(picture), str(picture), name)
        with files.reached(output), files.whole(output) as path:
            pages.write(path, "prefix.html", title=name, shown=shown, caption=caption, words=words)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
