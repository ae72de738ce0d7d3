"""One step of training: a model, an optimiser and a batch in, a new state and metrics out."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipcap_jax import parallel
from clipcap_jax.config import Targets
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.training.loss import caption_loss

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What a step changes. `params` are the trained parts alone; `key` is a random key's data, uint32 `(2,)`, as arrays
    of keys cannot be stored; it stays the same, and every step derives its own."""

    step: jax.Array
    key: jax.Array
    params: Params
    opt_state: optax.OptState


def dropout_key(key: jax.Array) -> jax.Array:
    """A key of XLA's own generator: JAX's default one takes longer to compile and to run."""
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")


def make_step(
    model: ClipCap,
    optimizer: optax.GradientTransformation,
    *,
    dropout: Collection[str],
    label_smoothing: float,
    targets: Targets,
) -> Callable[[TrainState, Params, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training on one device's share of a batch, for `parallel.map_step`.

    `dropout` names the parts that drop out. The step takes the state, the frozen parts' parameters and a batch as
    `data.make_batch` makes it. Losses, token counts and gradients are summed over devices and divided once, so that
    every token weighs the same wherever it is.
    """

    def step(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key = jax.random.fold_in(key, parallel.device_index())
        rngs = {"dropout": dropout_key(key)}

        def loss_sum(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(
                {"params": {**frozen, **params}}, batch["inputs"], batch["tokens"], dropout=dropout, rngs=rngs
            )
            return caption_loss(logits, batch["tokens"], batch["lengths"], label_smoothing, targets)

        (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params)
        loss, tokens, grads = parallel.sum_over_devices((loss, tokens, grads))
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss / tokens, "gradient_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def init_params(model: ClipCap, embedding_width: int, seed: int) -> Params:
    """Fresh parameters; with those of the tower, if the model has one, even if it is to learn from embeddings."""
    clip, tokens = model.config.clip, jnp.zeros((1, 2), jnp.int32)
    if clip is None:
        inputs: Any = jnp.zeros((1, embedding_width))
    else:
        inputs = jnp.zeros((1, clip.image_size, clip.image_size, 3), jnp.uint8)
    return jax.jit(model.init)(jax.random.key(seed), inputs, tokens)["params"]
