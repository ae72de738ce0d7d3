"""One step of training: a model, an optimiser and a batch in, a new state and metrics out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipcap_jax import parallel
from clipcap_jax.config import TrainConfig
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.training import optim
from clipcap_jax.training.loss import caption_loss

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      step: how many were taken, int32.
      params: of the trained parts alone.
      average: of these over the steps; None where none is kept.
      opt_state: Optax's.
    """

    step: jax.Array
    params: Params
    average: Params | None
    opt_state: optax.OptState

    @property
    def best(self) -> Params:
        """The parameters that are validated, and used afterwards."""
        return self.params if self.average is None else self.average


def dropout_key(key: jax.Array) -> jax.Array:
    """A key of XLA's own generator: JAX's default one takes longer to compile and to run."""
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")


def init_params(model: ClipCap, embedding_width: int, seed: int) -> Params:
    """Fresh parameters; with those of the tower, if the model has one, even if it is to learn from embeddings."""
    return jax.jit(model.init)(jax.random.key(seed), *_inputs(model, embedding_width))["params"]


def param_shapes(model: ClipCap, embedding_width: int) -> Params:
    """As `init_params`, but only what shapes and types they have."""
    shapes: Params = jax.eval_shape(model.init, jax.random.key(0), *_inputs(model, embedding_width))["params"]
    return shapes


def _inputs(model: ClipCap, embedding_width: int) -> tuple[jax.Array, jax.Array]:
    clip, tokens = model.config.clip, jnp.zeros((1, 2), jnp.int32)
    if clip is None:
        inputs = jnp.zeros((1, embedding_width))
    else:
        inputs = jnp.zeros((1, clip.image_size, clip.image_size, 3), jnp.uint8)
    return inputs, tokens


def make_step(
    model: ClipCap,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    *,
    average_decay: float = 0.0,
) -> Callable[[TrainState, Params, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training on one device's share of a batch, for `parallel.map_step`.

    The step takes the state, the frozen parts' parameters and a batch as `batches.make_batch` makes it. Parts that are
    trained drop out; what is frozen is used as it is. Losses, token counts and gradients are summed over devices and
    divided once, so that every token weighs the same wherever it is.

    Args:
      model: whose loss is lowered.
      optimizer: for the trained parts.
      schedule: the learning rate that it takes, which is among the metrics.
      config: the seed of dropout, what is trained and the loss.
      average_decay: of `TrainState.average`.
    """

    def step(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        key = jax.random.fold_in(key, parallel.device_index())
        rngs = {"dropout": dropout_key(key)}

        def loss_sum(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(
                {"params": {**frozen, **params}}, batch["inputs"], batch["tokens"], dropout=config.trainable, rngs=rngs
            )
            return caption_loss(logits, batch["tokens"], batch["lengths"], config.label_smoothing, config.targets)

        (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params)
        loss, tokens, grads = parallel.sum_over_devices((loss, tokens, grads))
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = optim.moved_average(average, params, state.step + 1, average_decay)
        metrics = {
            "loss": loss / tokens,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
        }
        return TrainState(state.step + 1, params, average, opt_state), metrics

    return step
