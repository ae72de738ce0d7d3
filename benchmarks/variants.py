"""Other forms of what a step of training computes, each one change to the code while it is traced."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal
from unittest import mock

import jax

Change = Callable[[], AbstractContextManager[object]]


def replaced(target: str, value: object) -> Change:
    return lambda: mock.patch(target, value)


def library_attention(implementation: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
    """JAX's own; without dropout, so for what is frozen alone."""

    def attention(
        query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, drop: object
    ) -> jax.Array:
        query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
        causal = mask is not None  # training has no other mask
        attended = jax.nn.dot_product_attention(query, keys, values, is_causal=causal, implementation=implementation)
        return attended.swapaxes(1, 2)

    return attention


def the_other_loop() -> AbstractContextManager[object]:
    """Layers in the form that they do not have on this device."""
    scan: Any = jax.lax.scan

    def other(*arguments: Any, unroll: bool = False, **options: Any) -> Any:
        return scan(*arguments, unroll=not unroll, **options)

    return mock.patch("jax.lax.scan", other)


def dropout_of_16_bits(self: Any, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
    """`nn.Dropout` from half as many random bits: at a rate of 0.1, 0.100006 are dropped."""
    if self.rate == 0 or self.deterministic or deterministic:
        return inputs
    shape = tuple(1 if axis - inputs.ndim in self.broadcast_dims else n for axis, n in enumerate(inputs.shape))
    kept = jax.random.bits(self.make_rng("dropout"), shape, "uint16") >= round(self.rate * 2**16)
    return jax.numpy.where(kept, inputs / (1 - self.rate), 0).astype(inputs.dtype)


ATTENTION = "clipcap_jax.models.transformer.attention"

VARIANTS: dict[str, dict[str, Change]] = {
    "mlp": {
        "as it is": contextlib.nullcontext,
        "layers unrolled on CPUs, in a loop on GPUs": the_other_loop,
        "dropout's bits from threefry": replaced("clipcap_jax.training.step.dropout_key", lambda key: key),
        "dropout of 16 bits": replaced("flax.linen.Dropout.__call__", dropout_of_16_bits),
        "no dropout": replaced("flax.linen.Dropout.__call__", lambda self, inputs, deterministic=None: inputs),
        "no sum over devices": replaced("clipcap_jax.parallel.sum_over_devices", lambda tree: tree),
    },
    "transformer": {
        "as it is": contextlib.nullcontext,
        "layers unrolled on CPUs, in a loop on GPUs": the_other_loop,
        "attention by XLA's function": replaced(ATTENTION, library_attention("xla")),
        "attention by cuDNN": replaced(ATTENTION, library_attention("cudnn")),
    },
}
