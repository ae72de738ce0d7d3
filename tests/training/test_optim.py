import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import clipcap_config

from clipcap_jax.config import OptimizerConfig
from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.training.optim import moved_average, optimizer, schedule

CONFIG = OptimizerConfig(
    learning_rate=0.1,
    warmup_steps=2,
    weight_decay=0.3,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-6,
    clip_norm=0.0,
    average_decay=0.0,
)


@pytest.mark.parametrize(
    ("warmup_steps", "total_steps", "expected"),
    [
        (4, 12, [0, 1 / 4, 2 / 4, 3 / 4, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        (0, 5, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]),
        (4, 4, [0, 1 / 4, 2 / 4, 3 / 4, 1]),
        (9, 4, [0, 1 / 4, 2 / 4, 3 / 4, 1]),  # a warm-up longer than the run takes all of it
        (0, 1, [1, 0]),
        (5, 1, [0, 1]),
    ],
)
def test_schedule(warmup_steps: int, total_steps: int, expected: list[float]) -> None:
    rate = schedule(dataclasses.replace(CONFIG, warmup_steps=warmup_steps), total_steps)
    rates = [rate(step) for step in range(total_steps + 1)]
    np.testing.assert_allclose(rates, 0.1 * np.array(expected), rtol=1e-6, atol=1e-9)


def test_schedule_of_the_paper() -> None:
    """`get_linear_schedule_with_warmup` of transformers, which the original uses: its formula."""
    rate, total = schedule(dataclasses.replace(CONFIG, learning_rate=2e-5, warmup_steps=5000), 141_600), 141_600
    for step in (0, 1, 2500, 4999, 5000, 5001, 70_000, total - 1):
        factor = step / 5000 if step < 5000 else (total - step) / (total - 5000)
        assert rate(step) == pytest.approx(2e-5 * factor, rel=1e-5)


def adamw(config: OptimizerConfig, params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]]) -> Any:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, with torch's `clip_grad_norm_` before it.

    The rates are those of a run whose first two steps warm up; `kernel` alone decays.
    """
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros(value.shape) for name, value in params.items()}
    second = {name: np.zeros(value.shape) for name, value in params.items()}
    for step, grads in enumerate(gradients, start=1):
        rate = config.learning_rate * [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4][step - 1]
        norm = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads.values()))
        scale = config.clip_norm / norm if 0 < config.clip_norm < norm else 1.0
        for name, value in params.items():
            grad = scale * grads[name]
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
            mean, square = first[name] / (1 - config.beta1**step), second[name] / (1 - config.beta2**step)
            decay = config.weight_decay * value if name == "kernel" else 0.0
            params[name] = value - rate * (mean / (np.sqrt(square) + config.epsilon) + decay)
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw(weight_decay: float, clip_norm: float) -> None:
    config = dataclasses.replace(CONFIG, weight_decay=weight_decay, clip_norm=clip_norm)
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}

    def draw(scale: float) -> dict[str, np.ndarray]:
        return {name: random.normal(0, scale, shape).astype(np.float32) for name, shape in shapes.items()}

    start, gradients = draw(1.0), [draw(scale) for scale in (5.0, 0.01, 1.0, 0.1, 10.0, 1e-4)]
    transformation = optimizer(config, total_steps=6)
    params: Any = {"layer": jax.tree.map(jnp.asarray, start)}
    state = transformation.init(params)
    for grads in gradients:
        updates, state = transformation.update({"layer": grads}, state, params)
        params = optax.apply_updates(params, updates)
    expected = adamw(config, start, gradients)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-6), params["layer"], expected)


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_only_kernels_decay(mapper: Any) -> None:
    """Without gradients nothing else moves a parameter."""
    tower = ClipVitConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, embedding_width=6)
    model = ClipCap(dataclasses.replace(clipcap_config(mapper=mapper), clip=tower))
    images, tokens = jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"]
    params = jax.tree.map(lambda leaf: np.ones((1,) * leaf.ndim, np.float32), shapes)
    transformation = optimizer(dataclasses.replace(CONFIG, warmup_steps=0), total_steps=10)
    updates, _ = transformation.update(jax.tree.map(np.zeros_like, params), transformation.init(params), params)

    moved: dict[str, set[float]] = {}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        moved.setdefault(path[-1].key, set()).update(np.unique(update).tolist())
    assert list(moved.pop("kernel")) == pytest.approx([-0.1 * 0.3])
    constants = {"constants"} if mapper == "transformer" else set()
    still = {"bias", "scale", "class_token", "positions", "token_embeddings", "position_embeddings"} | constants
    assert moved == {name: {0.0} for name in still}


def test_the_average_weighs_the_steps() -> None:
    """Each counts `decay` times what the next counts; but little of the random start stays, whatever the decay."""
    steps, decay = 60, 0.9
    average, early = {"kernel": np.eye(steps + 1)[0]}, np.zeros(0)  # the start and each step, told apart
    for step in range(1, steps + 1):
        average = moved_average(average, {"kernel": np.eye(steps + 1)[step]}, jnp.int32(step), decay)
        early = average["kernel"] if step == 10 else early
    weights = average["kernel"]
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert weights[-1] == pytest.approx(1 - decay, rel=1e-5)
    np.testing.assert_allclose(weights[30:-1] / weights[31:], decay, rtol=1e-5)
    assert early.sum() == pytest.approx(1, rel=1e-5)
    assert early[:2].sum() < 0.01  # the first step has a learning rate of 0: it ends at the start
    assert early[-1] < 0.3
