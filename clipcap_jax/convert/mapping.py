"""Which tensor of a PyTorch file is which of our parameters: one table for the way in and the way out.

A table has an entry for every parameter of a model, under the parameter's path: `{"transformer/layers/norm_1/scale":
Source("h.{layer}.ln_1.weight")}`. What lies below a `layers` is stacked on a first axis with us, and a tensor of each
layer there.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from clipcap_jax.errors import UserError

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]

_NAMED = 10  # problems that a message names


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter's place in the file.

    Attributes:
      names: of its tensors; several are joined on the first axis. `{layer}` stands for the layer's number.
      layout: "linear" is torch's (out, in) where ours is (in, out), "conv" (out, in, height, width) where ours is
        (height, width, in, out).
      shares: how the first axis is shared out between several tensors.
    """

    names: tuple[str, ...]
    layout: Literal["same", "linear", "conv"] = "same"
    shares: tuple[int, ...] = (1,)

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """From torch's layout."""
        return tensor.transpose({"same": range(tensor.ndim), "linear": (1, 0), "conv": (2, 3, 1, 0)}[self.layout])

    def theirs(self, parameter: np.ndarray) -> np.ndarray:
        """To torch's layout."""
        return parameter.transpose({"same": range(parameter.ndim), "linear": (1, 0), "conv": (3, 2, 0, 1)}[self.layout])

    def tensors(self, path: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every tensor that the parameter of this path and shape is made of."""
        layers, shape = (range(shape[0]), shape[1:]) if _is_stacked(path) else (range(1), shape)
        joined = self.theirs(np.broadcast_to(np.float32(0), shape)).shape
        for layer in layers:
            for name, share in zip(self.names, self.shares, strict=True):
                several = len(self.names) > 1
                size = (share * joined[0] // sum(self.shares), *joined[1:]) if several else joined
                yield name.format(layer=layer), size


Table = Mapping[str, Source]


def some(names: Iterable[str], most: int = _NAMED) -> str:
    """For a message: the first of the names, which a file may hold any number of, of any length."""
    first = [f"{name:.80}" for name in itertools.islice(names, most + 1)]
    return ", ".join([*first[:most], "..."] if len(first) > most else first)


def same(ours: str, theirs: str) -> dict[str, Source]:
    """A tensor that is kept as it is."""
    return {ours: Source((theirs,))}


def norm(ours: str, theirs: str) -> dict[str, Source]:
    """A layer norm."""
    return {f"{ours}/scale": Source((f"{theirs}.weight",)), f"{ours}/bias": Source((f"{theirs}.bias",))}


def linear(ours: str, theirs: str) -> dict[str, Source]:
    """A linear layer with a bias."""
    return {f"{ours}/kernel": Source((f"{theirs}.weight",), "linear"), f"{ours}/bias": Source((f"{theirs}.bias",))}


def conv(ours: str, theirs: str) -> dict[str, Source]:
    """A convolution with a bias."""
    return {f"{ours}/kernel": Source((f"{theirs}.weight",), "conv"), f"{ours}/bias": Source((f"{theirs}.bias",))}


def load(table: Table, shapes: Any, arrays: Mapping[str, np.ndarray], ignored: Mapping[str, str], source: str) -> Any:
    """Our parameters from a file's tensors.

    Args:
      table: an entry for every parameter.
      shapes: a tree of what the parameters have to be like, from `jax.eval_shape`.
      arrays: the file's tensors, of any floating type.
      ignored: patterns (matched whole) of tensors that are not needed, each with the reason.
      source: the file's name, for messages.

    Returns:
      The tree, of float32 arrays.

    Raises:
      UserError: tensors are missing, have another shape, are not finite, or are not known; all are counted, the first
        are named.
    """
    problems: list[str] = []
    used: set[str] = set()

    def check(path: str, shape: Shape) -> None:
        for name, expected in table[path].tensors(path, shape):
            used.add(name)
            if name not in arrays:
                problems.append(f"{name} is not there")
            elif arrays[name].shape != expected:
                problems.append(f"{name} has the shape {arrays[name].shape}, where {expected} is needed")
            elif not np.isfinite(arrays[name]).all():
                problems.append(f"{name} holds values that are not finite")

    jax.tree_util.tree_map_with_path(lambda path, leaf: check(_name(path), leaf.shape), shapes)
    problems += [
        f"{name:.80} is not known"
        for name in sorted(set(arrays) - used)
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if problems:
        more = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise UserError(
            f"{source} does not hold the weights of this architecture. {len(problems)} tensors are wrong:\n  "
            + "\n  ".join(problems[:_NAMED] + more)
        )

    def parameter(path: str, shape: Shape) -> np.ndarray:
        entry = table[path]

        def one(layer: int | None) -> np.ndarray:
            parts = [np.asarray(arrays[name.format(layer=layer)], np.float32) for name in entry.names]
            return entry.ours(np.concatenate(parts) if len(parts) > 1 else parts[0])

        return np.stack([one(layer) for layer in range(shape[0])]) if _is_stacked(path) else one(None)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: parameter(_name(path), leaf.shape), shapes)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_stacked(path: str) -> bool:
    return "layers" in path.split("/")


def store(table: Table, params: Any) -> Arrays:
    """The file's tensors from our parameters: the inverse of `load`."""
    return dict(_stored(table, params))


def _stored(table: Table, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = table[_name(path)]
        for layer, parameter in enumerate(np.asarray(leaf) if _is_stacked(_name(path)) else [np.asarray(leaf)]):
            joined = entry.theirs(parameter)
            parts = [joined]
            if len(entry.names) > 1:
                parts = np.split(joined, np.cumsum(entry.shares)[:-1] * (len(joined) // sum(entry.shares)))
            for name, part in zip(entry.names, parts, strict=True):
                yield name.format(layer=layer), np.ascontiguousarray(part)
