"""People's files become a prepared data set, in the one schema of `clipcap_jax.datasets.schema`, and its page."""

from clipcap_jax.datasets.records import RecordsSource, prepare_records
from clipcap_jax.datasets.schema import Example, Split, open_split
from clipcap_jax.datasets.shapes import prepare_shapes
from clipcap_jax.datasets.source import Problem
from clipcap_jax.datasets.summary import Summary

__all__ = [
    "Example",
    "Problem",
    "RecordsSource",
    "Split",
    "Summary",
    "coco",
    "conceptual",
    "downloads",
    "flickr",
    "nocaps",
    "open_split",
    "prepare",
    "prepare_records",
    "prepare_shapes",
    "readers",
    "schema",
    "shapes",
    "shards",
    "source",
    "summary",
    "tfds_coco",
]
