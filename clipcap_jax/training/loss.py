"""The captioning loss as a sum and a count, so that devices can be added up before dividing."""

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
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]  # B T
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(axis=-1)
    mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]  # B T
    if targets == "original":
        mask &= tokens != 0
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
