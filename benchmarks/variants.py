"""Other forms of what a step of training computes, each one change to the code while it is traced."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp

Change = Callable[[], AbstractContextManager[object]]


def replaced(target: str, value: object) -> Change:
    return lambda: mock.patch(target, value)


def masked_sum(loss: jax.Array, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)


def logsumexp_loss(logits: jax.Array, tokens: jax.Array, lengths: jax.Array, *_: object) -> tuple[jax.Array, jax.Array]:
    """`caption_loss` without the log-probabilities, a second array of `B T V`."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return masked_sum(jax.nn.logsumexp(logits, axis=-1) - chosen, tokens, lengths)


@jax.custom_vjp
def token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return token_loss_forward(logits, tokens)[0]


def token_loss_forward(
    logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return total - chosen, (logits, tokens, total)


def token_loss_backward(kept: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    logits, tokens, total = kept
    found = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2) == tokens[..., None]
    return (jnp.exp(logits - total[..., None]) - found) * cotangent[..., None], None


token_loss.defvjp(token_loss_forward, token_loss_backward)


def own_gradient_loss(
    logits: jax.Array, tokens: jax.Array, lengths: jax.Array, *_: object
) -> tuple[jax.Array, jax.Array]:
    """`caption_loss` with the gradient written out, from logits and their logsumexp."""
    return masked_sum(token_loss(logits, tokens), tokens, lengths)


@jax.custom_vjp
def logits_of(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32)


def logits_backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, weights = kept
    cotangent = cotangent.astype(hidden.dtype)
    return jnp.einsum("...v,vd->...d", cotangent, weights), jnp.einsum("btv,btd->vd", cotangent, hidden)


logits_of.defvjp(lambda hidden, weights: (logits_of(hidden, weights), (hidden, weights)), logits_backward)


def compute_dtype_logits(self: object, hidden: jax.Array) -> jax.Array:
    """`Gpt2.logits` whose gradient's products have operands of the compute dtype: now one of them is float32."""
    return logits_of(hidden, self.token_embeddings.astype(self.dtype))  # type: ignore[attr-defined]


def library_attention(implementation: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
    """JAX's own; without dropout, so for what is frozen alone."""

    def attention(
        query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None, drop: object
    ) -> jax.Array:
        return jax.nn.dot_product_attention(
            query,
            keys,
            values,
            is_causal=mask is not None,  # training has no other mask
            implementation=implementation,
        )

    return attention


@contextlib.contextmanager
def lean_logits() -> Iterator[None]:
    """The two above together."""
    with LOSS_OWN_GRADIENT(), LOGITS():
        yield


UNROLLED = replaced("jax.lax.scan", functools.partial(jax.lax.scan, unroll=True))
LOSS_OWN_GRADIENT = replaced("clipcap_jax.training.step.caption_loss", own_gradient_loss)
LOGITS = replaced("clipcap_jax.models.gpt2.Gpt2.logits", compute_dtype_logits)
ATTENTION = "clipcap_jax.models.transformer.attention"

VARIANTS: dict[str, dict[str, Change]] = {
    "mlp": {
        "as it is": contextlib.nullcontext,
        "logits' gradients in the compute dtype": LOGITS,
        "loss from logsumexp": replaced("clipcap_jax.training.step.caption_loss", logsumexp_loss),
        "loss with its own gradient": LOSS_OWN_GRADIENT,
        "both of logits and loss": lean_logits,
        "layers unrolled": UNROLLED,
        "dropout's bits from threefry": replaced("clipcap_jax.training.step.dropout_key", lambda key: key),
        "no sum over devices": replaced("clipcap_jax.parallel.sum_over_devices", lambda tree: tree),
    },
    "transformer": {
        "as it is": contextlib.nullcontext,
        "attention by XLA's function": replaced(ATTENTION, library_attention("xla")),
        "attention by cuDNN": replaced(ATTENTION, library_attention("cudnn")),
        "layers unrolled": UNROLLED,
    },
}
