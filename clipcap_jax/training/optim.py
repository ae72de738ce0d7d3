"""AdamW with linear warm-up and linear decay to zero, as the original trains (its `train.py`, `train`)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipcap_jax.config import OptimizerConfig, TrainConfig
from clipcap_jax.inputs.batches import steps_per_epoch


def total_steps(config: TrainConfig, pairs: int) -> int:
    """From the beginning of a run over so many pairs to its end."""
    return max(1, round(config.epochs * steps_per_epoch(pairs, config.batch_size)))


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
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def moved_average(average: Any, params: Any, steps: jax.Array, decay: float) -> Any:
    """The average of the parameters over `steps` steps, the last of which has made `params`."""
    # A third of the way back at most, or the random start would stay in the average for long.
    weight = jnp.maximum(1 - decay, 3 / (2 + steps))
    return jax.tree.map(lambda before, param: before + weight * (param - before), average, params)
