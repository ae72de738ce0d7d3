"""What was prepared, and what was skipped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clipcap_jax.datasets.source import Problem


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a prepared data set holds; `rich.print` shows it as a table.

    Attributes:
      name: the data set, such as "records/flickr8k".
      folder: where it lies.
      images: pictures (or their embeddings) kept, by split.
      captions: captions kept, by split.
      words: how many captions have how many words.
      skipped: how often something was skipped, by reason, the most frequent first.
      problems: the first of what was skipped, one by one.
      notes: what else the user should know, such as fields that were not used.
      found: where that lay which it was prepared from.
      already_prepared: nothing was written this time.
    """

    name: str
    folder: str
    images: Mapping[str, int]
    captions: Mapping[str, int]
    words: Mapping[int, int]
    skipped: Mapping[str, int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    found: Mapping[str, Any]
    already_prepared: bool = False

    @property
    def lengths(self) -> str:
        """What `words` come to; "" where there are no captions."""
        if not self.words:
            return ""
        lengths, counts = (np.array(values) for values in zip(*sorted(self.words.items()), strict=True))
        half, most = lengths[np.searchsorted(np.cumsum(counts), [0.5 * counts.sum(), 0.99 * counts.sum()])]
        mean = np.average(lengths, weights=counts)
        return f"{mean:.1f} on average, half have up to {half}, 99% up to {most}, the longest {lengths[-1]}"

    def __rich__(self) -> RenderableType:
        state = "was prepared before, nothing to do" if self.already_prepared else "is prepared"
        table = Table("split", "images", "captions")
        for split, images in self.images.items():
            table.add_row(Text(split), f"{images:,}", f"{self.captions[split]:,}")
        lines = [f"words in a caption: {self.lengths}"] if self.words else []
        lines += [f"skipped {count:,}: {reason}" for reason, count in self.skipped.items()]
        lines += [f"  {problem}" for problem in self.problems[:10]]
        lines += [f"all that was skipped: {self.folder}/problems.jsonl"] * bool(self.problems)
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"sample pictures and the lengths of captions: {self.folder}/report.html")
        return Group(Text(f"{self.name} {state}: {self.folder}"), table, *map(Text, lines))
