"""Data sets: TFDS builders that need no TensorFlow, all in the schema of `clipcap_jax.datasets.schema`."""

from clipcap_jax.datasets.prepare import Summary
from clipcap_jax.datasets.records import RecordsSource, prepare_records
from clipcap_jax.datasets.schema import Example, Split, open_split
from clipcap_jax.datasets.shapes import prepare_shapes
from clipcap_jax.datasets.source import Problem

__all__ = [
    "Example",
    "Problem",
    "RecordsSource",
    "Split",
    "Summary",
    "open_split",
    "prepare_records",
    "prepare_shapes",
]
