"""What a source of examples gives."""

import pickle

from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import Problem, Source


def read(source: Source) -> tuple[dict[tuple[str, str], Example], list[Problem]]:
    """Examples by split and image_id, and all problems; of parts that were pickled, as preparing sends them."""
    problems = list(source.problems)
    examples: dict[tuple[str, str], Example] = {}
    for part in source.parts:
        for example in pickle.loads(pickle.dumps(part)):
            if isinstance(example, Problem):
                problems.append(example)
            else:
                assert (part.split, example.image_id) not in examples
                examples[part.split, example.image_id] = example
    return examples, problems
