"""Captions beside their pictures: tables for the terminal and one HTML page that needs nothing but itself."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clipcap_jax import pictures
from clipcap_jax.errors import UserError
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.progress import track

if TYPE_CHECKING:  # they import this
    from clipcap_jax.datasets import Example, Summary

_LONGEST_SIDE = 320  # of an embedded picture, in pixels
_HOW = ("store_images", "split")  # of a data set's origin: options, not where it is from
_DRAWING_SIDE = 128  # a picture no larger than this is kept exact and shown with hard pixel edges


@dataclasses.dataclass(frozen=True)
class Row:
    """One captioned picture.

    Attributes:
      image_id: the picture's identifier in its data set.
      caption: what the captioner wrote.
      references: what people wrote.
      scores: of this picture alone, by metric.
      read_image: gives the encoded picture, or None to read it from `image_path`.
      image_path: where the picture lies; may be empty or gone, and is then named in the picture's place.
      finished: whether the caption ended by itself rather than at the length limit.
    """

    image_id: str
    caption: str
    references: tuple[str, ...]
    scores: Mapping[str, float]
    read_image: Callable[[], bytes | None]
    image_path: str
    finished: bool


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A picture as a data URI, or None with `missing` saying why."""

    uri: str | None
    is_drawing: bool
    missing: str


def write_page(
    path: str | Path, *, title: str, rows: Sequence[Row], scorecard: Scorecard, pictures: int = 1000
) -> None:
    """Writes the scores, then the captions beside their pictures, to be sorted by any score, as one HTML file.

    The file holds its pictures, shrunk to 320 pixels, and refers to nothing outside itself.

    Args:
      path: the file to write; its folder is made.
      title: the heading.
      rows: every captioned picture, in any order.
      scorecard: the scores, and what the reader needs to know of them.
      pictures: how many it holds: half of them of the captions with the best CIDEr, half of those with the worst. Of
        the others it says where they are.

    Raises:
      OSError: the file cannot be written.
    """
    ranked = sorted(rows, key=lambda row: (-row.scores["CIDEr"], row.image_id))
    left_out = range(pictures - pictures // 2, len(ranked) - pictures // 2)
    bar = track(ranked, "Writing the page", total=len(ranked), console=Console(stderr=True), transient=True)
    _write(
        path,
        "page.html",
        title=title,
        scorecard=scorecard,
        metrics=list(scorecard.scores.measures),
        unfinished=sum(not row.finished for row in rows),
        cards=[
            (row, _left_out(row) if place in left_out else _picture(row.read_image(), row.image_path, row.image_id))
            for place, row in enumerate(bar)
        ],
    )


def write_dataset_page(path: str | Path, summary: "Summary", samples: Mapping[str, Sequence["Example"]]) -> None:
    """Writes what a data set holds, a histogram of its captions' lengths and samples, as one HTML file.

    Args:
      path: the file to write.
      summary: of the data set.
      samples: some examples of each split.

    Raises:
      OSError: the file cannot be written.
    """
    most = max(summary.words.values(), default=1)
    lengths = range(min(summary.words), max(summary.words) + 1) if summary.words else ()
    _write(
        path,
        "dataset.html",
        summary=summary,
        origin={name: _told(value) for name, value in summary.origin.items() if value is not None and name not in _HOW},
        bars=[(words, summary.words.get(words, 0), summary.words.get(words, 0) / most) for words in lengths],
        sections={
            split: [(example, _picture(example.image, example.image_path, example.image_id)) for example in examples]
            for split, examples in samples.items()
        },
    )


def _told(value: Any) -> str:
    """A JSON value as one writes it: "a, b" for a list, "yes" and "no"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(part)}" for key, part in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)


def _write(path: str | Path, template: str, **content: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipcap_jax"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template).render(content)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def print_scores(scorecard: Scorecard, console: Console) -> None:
    """Prints the scores and the facts, as wide as they need: what is narrower breaks lines, and cuts nothing off."""
    for content in scorecard.tables():
        table = Table(content.header[0], box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        for column in content.header[1:]:
            table.add_column(column, justify="right")
        for line in content.lines:
            style = "dim" if line.aside else ""
            table.add_row(*(Text(cell, style=style) for cell in (line.label, *line.cells)))
        width, wanted = console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console.width = max(width, wanted)
        console.print(table, "")
        console.width = width
    for name, fact in scorecard.facts().items():
        console.print(f"{name}: {fact}", highlight=False, markup=False, soft_wrap=True)


def captions_table(rows: Sequence[Row]) -> Table:
    """Captions for the terminal, each with its CIDEr and its first reference."""
    table = Table("image")
    table.add_column("CIDEr", justify="right")
    table.add_column("caption")
    table.add_column("one of the references", style="dim")
    for row in rows:  # as Text, which takes square brackets for what they are
        cider = f"{row.scores['CIDEr']:.2f}"
        table.add_row(Text(row.image_id), cider, Text(row.caption), Text("".join(row.references[:1])))
    return table


def _left_out(row: Row) -> _Picture:
    return _Picture(None, False, row.image_path or "This page holds the best and the worst captions' pictures alone.")


def _picture(image: bytes | None, path: str, name: str) -> _Picture:
    if image is None and not path:
        return _Picture(None, False, "There is no picture to show.")
    try:
        return _Picture(*_data_uri(Path(path).read_bytes() if image is None else image), "")
    except FileNotFoundError:
        return _Picture(None, False, f"There is no picture at {path}")
    except (OSError, UserError) as error:
        return _Picture(None, False, f"{path or name}: {error}")


def _data_uri(encoded: bytes) -> tuple[str, bool]:
    """Shrinks a picture and returns it as a data URI, and whether it is a small drawing rather than a photo."""
    image = pictures.decode(encoded)
    is_drawing = max(image.size) <= _DRAWING_SIDE
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    if is_drawing:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80)
    kind = "png" if is_drawing else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_drawing
