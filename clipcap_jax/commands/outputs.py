"""What `clipcap caption` writes, as files of several kinds or to the standard output.

It comes as a row for each picture: `{"image", "captions": [{"caption", "score", "finished"}, ...]}` or, without a
caption, `{"image", "error"}`. It is written as a line for each caption, `{"image", "caption", "score", "finished"}`.
Either may have `"duplicate_of"`, the name of an earlier picture.
"""

import csv
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from clipcap_jax.commands import cli
from clipcap_jax.commands.journal import Row
from clipcap_jax.errors import UserError
from clipcap_jax.files import is_remote, on_disk, to_json
from clipcap_jax.inputs import addresses
from clipcap_jax.inputs.addresses import Picture
from clipcap_jax.metrics import coco_files
from clipcap_jax.progress import screen

COLUMNS = ("image", "caption", "score", "finished", "error", "duplicate_of")
PAGE = 3000  # pictures of a page, which are some 15 KB each
_WORKERS = 4  # threads that read the pictures of a page
_AT_ONCE = 1000  # rows of a table on the screen, or of a group in a .parquet file


def row(name: Picture | int, found: Any, prefix: str, suffix: str) -> Row:
    """A picture's row, of its `Caption`s or the error in their place, with texts around each."""
    if isinstance(found, UserError):
        return {"image": str(name), "error": str(found)}
    captions = [
        {"caption": f"{prefix}{caption.text}{suffix}", "score": caption.score, "finished": caption.finished}
        for caption in found
    ]
    return {"image": str(name), "captions": captions}


def check(output: Path, n: int, *, duplicates: bool = False) -> None:
    """That a file of this name, with `n` captions of each picture, or marks of duplicates, can be written.

    Raises:
      UserError: it is of no kind that is known, or of one that needs a package or holds one caption of each.
    """
    if output.suffix not in _WRITERS:
        raise UserError(f"--output {output}: the name has to end in {', '.join(_WRITERS)}, or be - for JSON lines")
    if output.suffix == ".json" and n > 1:
        raise UserError(f"--output {output}: COCO's results have one caption of each picture: name a .jsonl file")
    if output.suffix == ".json" and duplicates:
        raise UserError(f"--output {output}: COCO's results have no place for duplicates: name a .jsonl file")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--output {output}: this needs pyarrow: pip install pyarrow, or name a .jsonl file")


def check_inputs(output: Path, inputs: Sequence[Any]) -> None:
    """That a file of this name can hold these pictures, or rows of a matrix.

    Raises:
      UserError: it cannot.
    """
    if output.suffix != ".html":
        return
    if not isinstance(inputs[0], Picture):
        raise UserError(f"--output {output}: a page shows pictures, not embeddings: name a .jsonl file")
    if len(inputs) > PAGE:
        raise UserError(
            f"--output {output}: a page shows up to {PAGE:,} pictures, not {len(inputs):,}: name fewer of them, or a "
            ".jsonl file"
        )


def write(output: Path, rows: Iterator[Row], inputs: Sequence[Any]) -> None:
    """Write all rows to a file of the kind that its name says, which is whole or not there.

    Args:
      output: the file.
      rows: as above.
      inputs: what they are of, in the same order: paths and addresses of pictures, or rows of a matrix.

    Raises:
      UserError: it cannot be written.
    """
    # Not by `files.whole`, whose place beside the file is where the journal lies.
    temporary = output if is_remote(output) else output.with_name(output.name + ".tmp")
    try:
        with on_disk(temporary) as here:
            _WRITERS[output.suffix](here, rows, inputs)
        if temporary != output:
            temporary.replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary != output:
            temporary.unlink(missing_ok=True)


def show(rows: Iterator[Row], *, as_json: bool) -> None:
    """Print the rows as they come, as lines of JSON, or tables for a person; until nobody reads any more."""
    lines = _lines(rows)
    while batch := list(itertools.islice(lines, 1 if as_json else _AT_ONCE)):
        if as_json:
            sys.stdout.write(to_json(batch[0]) + "\n")
        else:
            _print_table(batch)
        if cli.unread():
            break


def _lines(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        others = {name: value for name, value in row.items() if name != "captions"}
        yield from ({**others, **caption} for caption in row.get("captions", [{}]))


def _print_table(lines: list[Row]) -> None:
    table = Table("image", "caption")
    for line in lines:
        if "caption" in line:
            table.add_row(Text(line["image"], overflow="fold"), Text(line["caption"]))
    if table.row_count:
        screen().print(table)


def _write_jsonl(path: Path, rows: Iterator[Row], _: Sequence[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in _lines(rows))


def _write_csv(path: Path, rows: Iterator[Row], _: Sequence[Any]) -> None:
    # POSIX file names need not be UTF-8: what is not is written as it is.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(_lines(rows))


def _write_results(path: Path, rows: Iterator[Row], _: Sequence[Any]) -> None:
    captions = {row["image"]: row["captions"][0]["caption"] for row in rows if "captions" in row}
    coco_files.write_results(path, coco_files.by_number(captions))


def _write_parquet(path: Path, rows: Iterator[Row], _: Sequence[Any]) -> None:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    types = (arrow.string(), arrow.string(), arrow.float32(), arrow.bool_(), arrow.string(), arrow.string())
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)))
    lines = _lines(rows)
    with parquet.ParquetWriter(path, schema) as file:
        while batch := list(itertools.islice(lines, 10 * _AT_ONCE)):
            file.write_table(arrow.Table.from_pylist(list(map(_in_utf8, batch)), schema=schema))


def _in_utf8(line: Row) -> Row:
    """With escapes for what UTF-8 does not have, as JSON has it."""
    return {
        key: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for key, value in line.items()
    }


def _write_page(path: Path, rows: Iterator[Row], inputs: Sequence[Any]) -> None:
    from clipcap_jax import pages, pictures

    def card(picture: Picture, row: Row) -> tuple[Row, pages.Picture]:
        if "error" in row:
            return row, pages.Picture(None, False, row["error"])
        try:
            return row, pages.picture(addresses.read(picture), str(picture), row["image"])
        except (OSError, UserError) as error:
            return row, pages.Picture(None, False, str(error))

    pairs = zip(inputs, rows, strict=True)
    cards = list(pictures.load_ahead(lambda pair: card(*pair), pairs, workers=_WORKERS, ahead=_WORKERS))
    pages.write(path, "captions.html", title=path.name.partition(".")[0], cards=cards)


_WRITERS: dict[str, Callable[[Path, Iterator[Row], Sequence[Any]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".json": _write_results,
    ".parquet": _write_parquet,
    ".html": _write_page,
}
SUFFIXES = tuple(_WRITERS)
