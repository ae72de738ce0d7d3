"""What `clipcap caption` can say of pictures only when it has captioned all: near duplicates, and an order."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from clipcap_jax.commands.journal import Row

_EMBEDDING = "embedding"  # of a row, until all are there
_TYPE = np.dtype("<f2")  # a million of them, 640 wide, are 1.3 GB


def with_embedding(row: Row, embedding: np.ndarray) -> Row:
    """A picture's row with what tells whether it is a duplicate, as JSON can hold it."""
    unit = (embedding / np.linalg.norm(embedding)).astype(_TYPE)
    return {**row, _EMBEDDING: base64.b64encode(unit.tobytes()).decode()}


def marked(rows: Iterable[Row], threshold: float, console: Console) -> Iterator[Row]:
    """All rows, with the name of the earliest picture that each nearly equals instead of its embedding.

    Args:
      rows: in order; those without a caption have no embedding.
      threshold: the least cosine of pictures that nearly equal each other.
      console: where progress is shown.
    """
    from clipcap_jax.captioning.duplicates import first_equals

    everything, captioned, embeddings = [], [], bytearray()
    for row in rows:
        everything.append(row)
        if _EMBEDDING in row:
            captioned.append(row)
            embeddings += base64.b64decode(row.pop(_EMBEDDING))
    if captioned:
        matrix = np.frombuffer(embeddings, _TYPE).reshape(len(captioned), -1)
        found = first_equals(matrix, threshold, console=console, transient=True)
        for row, first in zip(captioned, found.tolist(), strict=True):
            if first >= 0:
                row["duplicate_of"] = captioned[first]["image"]
    return iter(everything)


def best_first(rows: Iterable[Row], inputs: Sequence[Any]) -> tuple[Iterator[Row], list[Any]]:
    """Rows and what they are of, by the score of their best caption; those without one last."""

    def best(pair: tuple[Row, Any]) -> float:
        row, _ = pair  # whose captions, if drawn, are in no order
        return max((caption["score"] for caption in row.get("captions", [])), default=-np.inf)

    ordered = sorted(zip(rows, inputs, strict=True), key=best, reverse=True)
    return (row for row, _ in ordered), [given for _, given in ordered]
