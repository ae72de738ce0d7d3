"""Other forms of what training, a search and a tower compute.

Each is one change to the code while that is traced, or to what XLA is told.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from flax.linen import normalization

from clipcap_jax.captioning.decode import _GROUP, _take
from clipcap_jax.models import transformer
from clipcap_jax.models.gpt2 import Gpt2

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
    return jnp.where(kept, inputs / (1 - self.rate), 0).astype(inputs.dtype)


plain_attention, plain_prefill, plain_moments = transformer.attention, Gpt2.prefill, normalization._compute_stats


def moments_in_two_passes(*arguments: Any, **options: Any) -> Any:
    """Of layer norms: the variance as the mean of squared differences, which XLA can put into one kernel with all else
    of a norm."""
    return plain_moments(*arguments, **{**options, "use_fast_variance": False})


@contextlib.contextmanager
def slots_in_sixteens() -> Iterator[None]:
    """Keys and values of a number of slots that kernels can read in wide words."""

    def prefill(self: Any, embeddings: jax.Array, slots: int) -> Any:
        return plain_prefill(self, embeddings, -(-slots // 16) * 16)

    def attention(query: jax.Array, keys: jax.Array, values: jax.Array, mask: Any, drop: Any) -> jax.Array:
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, keys.shape[2] - mask.shape[3])])
        return plain_attention(query, keys, values, mask, drop)

    with mock.patch.object(Gpt2, "prefill", prefill), mock.patch(ATTENTION, attention):
        yield


def decoding_attention_of_cudnn(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, drop: Any
) -> jax.Array:
    """Of queries that are not the keys' own: scores, softmax and sum in one kernel."""
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention  # the public one would copy the cache

    if mask is None or query.shape[2] == keys.shape[2]:
        return plain_attention(query, keys, values, mask, drop)
    attended: jax.Array = dot_product_attention(
        query, keys, values, mask=mask, scale=query.shape[-1] ** -0.5, qkv_layout="BNTH"
    )
    return attended


def likeliest_in_one_pass(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`decode._likeliest`, reading the logits once for the maxima of the groups and the sums of their exponentials."""
    padding = ((0, 0), (0, -logits.shape[-1] % _GROUP))
    groups = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(len(logits), -1, _GROUP)

    def merge(one: Any, other: Any) -> Any:
        highest = jnp.maximum(one[0], other[0])
        finite = jnp.maximum(highest, -1e30)
        return highest, sum(total * jnp.exp(maximum - finite) for maximum, total in (one, other))

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    maxima, totals = jax.lax.optimization_barrier(
        jax.lax.reduce((groups, jnp.ones_like(groups)), start, merge, (2,))  # or XLA merges it with what follows
    )
    highest = maxima.max(axis=-1, keepdims=True)
    _, best = jax.lax.top_k(maxima, min(count, maxima.shape[1]))
    best = jnp.sort(best)
    found, index = jax.lax.top_k(_take(groups, best).reshape(len(logits), -1), count)
    tokens = jnp.take_along_axis(best, index // _GROUP, axis=1) * _GROUP + index % _GROUP
    return found - highest - jnp.log((totals * jnp.exp(maxima - highest)).sum(axis=-1, keepdims=True)), tokens


def convolution_as_product(pixels: jax.Array, kernel: jax.Array, *_: Any, **others: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of patches that do not overlap."""
    patch = len(kernel)
    batch, height, width, channels = pixels.shape
    patches = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return jnp.einsum("bipjqc,pqcd->bijd", patches, kernel)


ATTENTION = "clipcap_jax.models.transformer.attention"
MOMENTS = "flax.linen.normalization._compute_stats"

VARIANTS: dict[str, dict[str, Change]] = {
    "mlp": {
        "as it is": contextlib.nullcontext,
        "layers unrolled on CPUs, in a loop on GPUs": the_other_loop,
        "dropout's bits from threefry": replaced("clipcap_jax.training.step.dropout_key", lambda key: key),
        "dropout of 16 bits": replaced("flax.linen.Dropout.__call__", dropout_of_16_bits),
        "no dropout": replaced("flax.linen.Dropout.__call__", lambda self, inputs, deterministic=None: inputs),
        "no sum over devices": replaced("clipcap_jax.parallel.sum_over_devices", lambda tree: tree),
        "products by cuBLAS": contextlib.nullcontext,
    },
    "transformer": {
        "as it is": contextlib.nullcontext,
        "layers unrolled on CPUs, in a loop on GPUs": the_other_loop,
        "attention by XLA's function": replaced(ATTENTION, library_attention("xla")),
        "attention by cuDNN": replaced(ATTENTION, library_attention("cudnn")),
    },
    "search": {
        "as it is": contextlib.nullcontext,
        "attention by cuDNN": replaced(ATTENTION, decoding_attention_of_cudnn),
        "norms' moments in two passes": replaced(MOMENTS, moments_in_two_passes),
        "slots in sixteens": slots_in_sixteens,
        "logits read once": replaced("clipcap_jax.captioning.decode._likeliest", likeliest_in_one_pass),
        "groups of 64 tokens": replaced("clipcap_jax.captioning.decode._GROUP", 64),
        "products by cuBLAS": contextlib.nullcontext,
        "the loop in one CUDA graph": contextlib.nullcontext,
    },
    "tower": {
        "as it is": contextlib.nullcontext,
        "patches by a product": replaced("jax.lax.conv_general_dilated", convolution_as_product),
        "norms' moments in two passes": replaced(MOMENTS, moments_in_two_passes),
        "products by cuBLAS": contextlib.nullcontext,
    },
}
COMMANDS = ["FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "CONDITIONAL", "WHILE", "DYNAMIC_SLICE_FUSION"]
# What XLA is told, where that is the change.
OPTIONS: dict[str, dict[str, Any]] = {
    "products by cuBLAS": {"xla_gpu_enable_triton_gemm": False},  # which takes a bias and GELU along
    "the loop in one CUDA graph": {"xla_gpu_enable_command_buffer": ",".join(COMMANDS)},
}
