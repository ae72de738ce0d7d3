"""AdamW with linear warm-up and linear decay to zero, as the original trains (its `train.py`, `train`)."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings.

    Attributes:
      learning_rate: the peak, reached after `warmup_steps`; from there it falls linearly to 0 at the end of the run.
      warmup_steps: a shorter run warms up to its end.
      weight_decay: on the matrices; not on biases, norms and embeddings.
      beta1, beta2, epsilon: Adam's.
      clip_norm: gradients with a larger global norm are scaled down to it; 0: never.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float


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
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw
