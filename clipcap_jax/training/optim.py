"""AdamW with linear warm-up and linear decay to zero, as the original trains (its `train.py`, `train`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipcap_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by step, counted from 0."""
    warmup_steps = min(config.warmup_steps, total_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup_steps),
            optax.linear_schedule(config.learning_rate, 0.0, total_steps - warmup_steps),
        ],
        [warmup_steps],
    )


def _is_matrix(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The gradient transformation for a run of `total_steps` steps."""
    adamw = optax.adamw(
        schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    if config.clip_norm:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return optax.chain(adamw, _average(config.average_decay)) if config.average_decay else adamw


class AverageState(NamedTuple):
    """`average`: of the parameters, over `steps` steps."""

    steps: jax.Array
    average: Any


def _average(decay: float) -> optax.GradientTransformation:
    """Leaves the updates as they are, and keeps the average of what they make of the parameters."""

    def init(params: Any) -> AverageState:
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))  # copied, as the state's buffers are donated

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        steps = state.steps + 1
        # A third of the way back at most, or the random start would stay in the average for long.
        weight = jnp.maximum(1 - decay, 3 / (2 + steps))
        now = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda before, param: before + weight * (param - before), state.average, now)
        return updates, AverageState(steps, average)

    return optax.GradientTransformation(init, update)


def swap_average(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """The average in place of the parameters, and they in its place; where none is kept, both as they were.

    Done twice, it changes nothing: checkpoints hold the average as `params`, and so all there is.
    """
    if not isinstance(opt_state[-1], AverageState):
        return params, opt_state
    return opt_state[-1].average, (*opt_state[:-1], opt_state[-1]._replace(average=params))
