"""Captions beside their pictures: tables for the terminal and one HTML page that needs nothing but itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clipcap_jax import pages
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.pages import Picture
from clipcap_jax.progress import screen, track


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
      picture: what tells it from others, as `Example.picture`; "" where that is not known.
      finished: whether the caption ended by itself rather than at the length limit.
    """

    image_id: str
    caption: str
    references: tuple[str, ...]
    scores: Mapping[str, float]
    read_image: Callable[[], bytes | None]
    image_path: str
    picture: str
    finished: bool


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
    bar = track(ranked, "Writing the page", total=len(ranked), console=screen(stderr=True), transient=True)
    shown = [
        None if place in left_out else pages.picture(row.read_image(), row.image_path, row.image_id, row.picture)
        for place, row in enumerate(bar)
    ]
    given = any(row.image_path for row in rows) or any(picture not in (None, pages.NO_PICTURE) for picture in shown)
    pages.write(
        path,
        "page.html",
        title=title,
        scorecard=scorecard,
        metrics=list(scorecard.scores.measures),
        unfinished=sum(not row.finished for row in rows),
        cards=[
            (row, picture or (_left_out(row) if given else pages.NO_PICTURE))
            for row, picture in zip(ranked, shown, strict=True)
        ],
    )


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
        console.print(f"{name}: {fact}", style="yellow" if name == "note" else None, soft_wrap=True)


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


def _left_out(row: Row) -> Picture:
    return Picture(None, False, row.image_path or "This page holds the best and the worst captions' pictures alone.")
