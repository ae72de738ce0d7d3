"""Functions that are compiled for each shape of their batch, which takes seconds to minutes."""

import contextlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from clipcap_jax import cluster, progress


class Compiled:
    """A function of a batch, its last argument, which says so while it is compiled for a new shape of that."""

    def __init__(self, name: str, program: Any, send: Callable[[Any], Any], finish: Callable[[Any], Any]):
        """A function that was not called yet.

        Args:
          name: what it is to a user who waits for the compiler.
          program: the function, of `jax.jit` or like one of that.
          send: makes of a batch, or of its shapes, what `program` takes; of what is sent already, the same.
          finish: what is done with its result.
        """
        self._name, self._program, self._send, self._finish = name, program, send, finish
        self._known: set[Any] = set()
        self._begun: dict[Any, futures.Future[Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        *constants, batch = arguments
        batch = self._send(batch)
        shapes = _shapes(batch)
        if shapes in self._known:
            return self._finish(self._program(*constants, batch))
        with progress.told(f"Compiling {self._name}") if cluster.is_main() else contextlib.nullcontext():
            if begun := self._begun.pop(shapes, None):
                begun.result()
            result = self._program(*constants, batch)  # which waits for the compiler, not for the devices
        self._known.add(shapes)
        return self._finish(result)

    def begin(self, executor: futures.Executor, *arguments: Any) -> None:
        """Begin to compile for arguments, or shapes, as they lie on devices; the first call with such waits for it.

        Of several processes each still compiles when it is called: shapes cannot be given there.
        """
        shapes = _shapes(arguments[-1])
        if cluster.count() == 1 and shapes not in self._known:
            self._begun[shapes] = executor.submit(lambda: self._program.lower(*arguments).compile())

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As of `jax.jit`'s functions: the program for such arguments, or for their shapes, not run; so its devices may
        be ones that are not here."""
        *constants, batch = arguments
        lowered: jax.stages.Lowered = self._program.lower(*constants, self._send(batch))
        return lowered


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
