"""One step of training: a model, an optimiser and a batch in, a new state and metrics out."""

import functools
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipcap_jax import parallel
from clipcap_jax.config import TrainConfig
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.models.transformer import Hooks
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
    """A key of XLA's own generator: JAX's default one takes longer to compile and to run.

    But XLA does not divide the work of its own: where a program is divided among devices, each would draw the numbers
    of the whole batch.
    """
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")


def init_params(model: ClipCap, embedding_width: int, seed: int, without: Container[str] = ()) -> Params:
    """Fresh parameters; with those of the tower, if the model has one, even if it is to learn from embeddings.

    `without`: parts that are to be left out.
    """

    def init(key: jax.Array) -> Params:
        params = model.init(key, *_inputs(model, embedding_width))["params"]
        return {name: part for name, part in params.items() if name not in without}

    params: Params = parallel.once(init)(jax.random.key(seed))
    return params


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
    layout: parallel.Layout = parallel.DATA_PARALLEL,
) -> Callable[[TrainState, Params, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """One step of training, for `layout.map_step`.

    The step takes the state, the frozen parts' parameters and a batch as `batches.make_batch` makes it. Parts that are
    trained drop out; what is frozen is used as it is. Losses, token counts and gradients are summed over micro-batches
    and devices and divided once, so that every token weighs the same wherever it is.

    Args:
      model: whose loss is lowered.
      optimizer: for the trained parts.
      schedule: the learning rate that it takes, which is among the metrics.
      config: the seed of dropout, what is trained, the loss, and how a step is fitted into memory.
      average_decay: of `TrainState.average`.
      layout: how the step is spread over devices.
    """
    model = ClipCap(model.config, _hooks(layout, config.remat))

    def sums(params: Params, frozen: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any, Params]:
        """Loss, tokens and gradients of what a step sees of a batch, or of a micro-batch of it."""
        batch = layout.rows(batch)
        rngs = {"dropout": dropout_key(key) if layout.by_share else key}

        def loss_sum(params: Params) -> tuple[jax.Array, jax.Array]:
            parts = {**frozen, **params}
            if "clip" in parts:  # of a size that fits at once; hooks are for the others
                parts["clip"] = layout.whole(parts["clip"])
            logits = model.apply(
                {"params": parts}, batch["inputs"], batch["tokens"], dropout=config.trainable, rngs=rngs
            )
            return caption_loss(logits, batch["tokens"], batch["lengths"], config.label_smoothing, config.targets)

        (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(params)
        return loss, tokens, layout.pinned(grads)

    def accumulated(
        params: Params, frozen: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[Any, Any, Params]:
        """As `sums`, a micro-batch at a time."""
        count = config.accumulation
        if count == 1:
            return sums(params, frozen, batch, key)
        # Every count-th row, not the first B/count: so each device has an equal part of every micro-batch already.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, numbered: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[Any, None]:
            number, micro_batch = numbered
            new = sums(params, frozen, micro_batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, new), None

        zero = jnp.float32(0)
        nothing = zero, zero, layout.pinned(jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, nothing, (jnp.arange(count), micro_batches))[0]

    def step(state: TrainState, frozen: Params, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        key = jax.random.fold_in(key, layout.device_index())
        loss, tokens, grads = accumulated(state.params, frozen, batch, key)
        grads = jax.tree.map(lambda grad: grad.astype(config.gradient_dtype), grads)
        loss, tokens, grads = layout.sum_over_devices((loss, tokens, grads))
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32) / tokens, grads)
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


def _hooks(layout: parallel.Layout, remat: bool) -> Hooks:
    # A scan's body needs no protection from being merged with its copy in the backward pass: they are two loops.
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
    if remat:
        return Hooks(layout.rows, layout.whole, checkpoint)
    if isinstance(layout, parallel.DataParallel):
        # A loop copies what it keeps for the backward pass: on GPUs a step takes 1.3 times as long.
        return Hooks(unroll=jax.default_backend() == "gpu")
    return Hooks(layout.rows, layout.whole, functools.partial(checkpoint, policy=layout.keeps))
