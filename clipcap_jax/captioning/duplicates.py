"""Pictures that nearly equal earlier ones, by the cosine of their embeddings."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import parallel
from clipcap_jax.inputs.batches import fill
from clipcap_jax.progress import track

_BLOCK = 4096  # pictures that are compared with as many others at once
_TOLERANCE = 1e-5  # of cosines, so that 1.0 finds what is equal


def first_equals(embeddings: np.ndarray, threshold: float, **bar: Any) -> np.ndarray:
    """The earliest picture that each nearly equals; all are compared with all before, on this process's devices.

    Args:
      embeddings: float `n E`.
      threshold: the least cosine of embeddings that nearly equal each other.
      **bar: options of `progress.track`.

    Returns:
      int `n`: an earlier row, or -1 where there is none.
    """
    size = parallel.round_up(min(_BLOCK, len(embeddings)), local=True)
    compare = parallel.map_rows(_first, local=True, name="the comparison of pictures")
    found = np.full(len(embeddings), -1)
    starts = range(0, len(embeddings), size)
    pairs = [(start, before) for start in starts for before in starts if before <= start]
    with contextlib.closing(track(pairs, "Comparing", total=len(pairs), **bar)) as shown:
        for start, before in shown:
            new = slice(start, start + size)
            if (found[new] < 0).any():
                rows = np.arange(len(embeddings), dtype=np.int32)[new]
                known = fill(embeddings[before : before + size], size)
                batch = fill(embeddings[new], size), fill(rows, size)
                first = compare((known, np.int32(before), np.float32(threshold - _TOLERANCE)), batch)[: len(rows)]
                found[new] = np.where(found[new] < 0, first, found[new])
    return found


def _first(constants: tuple[jax.Array, jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of each of a batch's rows the first of the known ones, of which number `start` is the first, that it equals."""
    (known, start, threshold), (embeddings, rows) = constants, batch
    cosines = jnp.matmul(_unit(embeddings), _unit(known).T, precision="highest")
    numbers = start + jnp.arange(len(known))
    equal = (cosines >= threshold) & (numbers[None] < rows[:, None])
    return jnp.where(equal.any(axis=1), start + equal.argmax(axis=1), -1)


def _unit(embeddings: jax.Array) -> jax.Array:
    embeddings = embeddings.astype(jnp.float32)
    return embeddings / jnp.linalg.norm(embeddings, axis=1, keepdims=True)
