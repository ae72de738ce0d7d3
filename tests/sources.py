"""Sources of given examples, and what a source gives."""

import functools
import pickle
from collections.abc import Sequence

from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import Part, Problem, Source


def read(source: Source) -> tuple[dict[tuple[str, str], Example], list[Problem]]:
    """Examples by split and image_id, and all problems; of parts that were pickled, as preparing sends them."""
    problems = list(source.problems)
    examples: dict[tuple[str, str], Example] = {}
    for part in source.parts:
        for example in pickle.loads(pickle.dumps(part)).read():
            if isinstance(example, Problem):
                problems.append(example)
            else:
                assert (part.split, example.image_id) not in examples
                examples[part.split, example.image_id] = example
    return examples, problems


def listed(name: str, split: str, examples: Sequence[Example]) -> Source:
    """A source of these examples, in one part; they all hold what the first one holds."""
    first = examples[0]
    return Source(
        name,
        origin={},
        parts=[Part(split, functools.partial(iter, tuple(examples)))],
        has_images=first.image is not None,
        embedding_width=None if first.embedding is None else len(first.embedding),
        encoder="an encoder",
    )
