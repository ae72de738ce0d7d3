"""The page of a prepared data set: what it holds, a histogram of its captions' lengths, and samples."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcap_jax import pages
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.summary import Summary


def write_page(path: Path, summary: Summary, root: str, samples: Mapping[str, Sequence[Example]]) -> None:
    """Writes what a data set holds, a histogram of its captions' lengths and samples, as one HTML file.

    Args:
      path: the file to write.
      summary: of the data set.
      root: the folder that their `image_path` starts from.
      samples: some examples of each split.

    Raises:
      OSError: the file cannot be written.
    """
    most = max(summary.words.values(), default=1)
    lengths = range(min(summary.words), max(summary.words) + 1) if summary.words else ()
    pages.write(
        path,
        "dataset.html",
        summary=summary,
        origin={name: _told(value) for name, value in summary.found.items() if value is not None},
        bars=[(words, summary.words.get(words, 0), summary.words.get(words, 0) / most) for words in lengths],
        sections={
            split: [
                (example, pages.picture(example.image, _place(root, example), example.image_id, example.picture))
                for example in examples
            ]
            for split, examples in samples.items()
        },
    )


def _place(root: str, example: Example) -> str:
    return example.image_path and os.path.join(root, example.image_path)


def _told(value: Any) -> str:
    """A JSON value as one writes it: "a, b" for a list, "yes" and "no"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(part)}" for key, part in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)
