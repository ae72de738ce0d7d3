"""The captioning loss as a sum and a count, so that devices can be added up before dividing."""

import functools

import jax
import jax.numpy as jnp

from clipcap_jax.config import Targets


def caption_loss(
    logits: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    label_smoothing: float = 0.0,
    targets: Targets = "all",
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy over the real tokens of a batch.

    A mean of per-device means would weigh the captions of a device with few tokens more than the others'; whoever
    calls this sums both results over devices and divides once.

    Args:
      logits: float32 `B T V`.
      tokens: int `B T`; what stands at and after a row's length is ignored.
      lengths: int `B`, real tokens per row, the end token included; 0 for a row that only fills the batch.
      label_smoothing: the share of the target spread evenly over the vocabulary.
      targets: "all" tokens are learnt, or, as in the original, those that are not 0: its `train.py` pads with 0 and
        calls `nnf.cross_entropy(..., ignore_index=0)`, which leaves out GPT-2's "!" too.

    Returns:
      The sum of the tokens' losses, float32, in nats, and the number of tokens, float32.
    """
    loss = _cross_entropy(logits, tokens, label_smoothing)  # B T
    mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]  # B T
    if targets == "original":
        mask &= tokens != 0
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits: jax.Array, tokens: jax.Array, label_smoothing: float) -> jax.Array:
    """Of each token. JAX's own gradient would keep the log-probabilities: a second array as large as the logits, which
    are larger than all else in a step."""
    return _cross_entropy_forward(logits, tokens, label_smoothing)[0]


def _cross_entropy_forward(
    logits: jax.Array, tokens: jax.Array, label_smoothing: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)  # B T
    loss = normaliser - (1 - label_smoothing) * jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    if label_smoothing:
        loss -= label_smoothing * logits.mean(axis=-1)
    return loss, (logits, tokens, normaliser)


def _cross_entropy_backward(
    label_smoothing: float, kept: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    logits, tokens, normaliser = kept
    chosen = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2) == tokens[..., None]
    target = (1 - label_smoothing) * chosen + label_smoothing / logits.shape[-1]
    return (jnp.exp(logits - normaliser[..., None]) - target) * cotangent[..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
