import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from random_models import clipcap_config, random_embeddings, random_params, random_tokens
from tiny import assert_close, in_process, make_config, named

from clipcap_jax import parallel
from clipcap_jax.config import TrainConfig
from clipcap_jax.models import gpt2
from clipcap_jax.models.clipcap import ClipCap, ClipCapConfig
from clipcap_jax.models.mapper import MapperConfig
from clipcap_jax.training import optim
from clipcap_jax.training.step import TrainState, make_step, param_shapes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hlo

BATCH = {
    "inputs": random_embeddings(0, 8),
    "tokens": random_tokens(0, 8, 7),
    "lengths": np.array([7, 7, 1, 0, 3, 1, 0, 0], np.int32),  # the devices have 14, 1, 4 and 0 tokens
}


def keep_gradients() -> optax.GradientTransformation:
    """Gradient descent whose state is the last gradients."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(lambda grad: -0.1 * grad, grads), grads),
    )


def start(params: Any) -> TrainState:
    """Its buffers are its own, as a step takes them."""
    params = jax.tree.map(np.array, params)
    return parallel.replicate(TrainState(jnp.int32(0), params, None, keep_gradients().init(params)))


SCHEDULE = optax.constant_schedule(0.1)


def settings(**changes: Any) -> TrainConfig:
    config = make_config(Path(), {"train.label_smoothing": 0.0}).train
    return dataclasses.replace(config, **changes)


def test_a_step_on_four_devices_equals_one_loss_on_one() -> None:
    model = ClipCap(clipcap_config(dropout=0.0))
    params = random_params(model, 0, BATCH["inputs"], BATCH["tokens"])

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, BATCH["inputs"], BATCH["tokens"])
        real = np.arange(7)[None] < BATCH["lengths"][:, None]
        targets = optax.smooth_labels(jax.nn.one_hot(BATCH["tokens"][real], 11), 0.1)
        return optax.softmax_cross_entropy(logits[real], targets).mean()

    expected, gradients = jax.jit(jax.value_and_grad(loss))(params)
    step = make_step(model, keep_gradients(), SCHEDULE, settings(trainable=("mapper", "gpt2"), label_smoothing=0.1))
    state, metrics = parallel.map_step(step)(start(params), {}, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_close(named(state.opt_state), named(gradients))
    assert_close(named(state.params), named(jax.tree.map(lambda param, grad: param - 0.1 * grad, params, gradients)))
    norm = np.sqrt(sum(np.sum(np.square(grad, dtype=np.float64)) for grad in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert state.step == 1


WIDE = {
    "inputs": random_embeddings(1, 16),
    "tokens": random_tokens(1, 16, 7),
    "lengths": np.array([7, 7, 1, 0, 3, 1, 0, 0, 5, 2, 7, 7, 0, 0, 0, 0], np.int32),
}
DATA, FSDP = parallel.DataParallel, functools.partial(parallel.FullySharded, whole_below=0)
Variant = Literal["mlp", "transformer"]
VARIANTS: dict[Variant, tuple[str, ...]] = {
    "mlp": ("mapper", "gpt2"),
    "transformer": ("mapper",),
}
# On four devices in every run, with accumulation where the layout makes it hardest; a program takes seconds to compile.
CASES = [
    pytest.param(
        kind(tuple(jax.devices()[:count])),
        accumulation,
        remat,
        id=f"{name} over {count}, accumulation {accumulation}{', remat' if remat else ''}",
        marks=[] if count == 4 and (name, accumulation) != ("data", 1) else pytest.mark.slow,
    )
    for name, kind, counts in (("data", DATA, (1, 2, 4)), ("fsdp", FSDP, (2, 4)))
    for count in counts
    for accumulation, remat in ((1, False), (4, count != 2))
]


@functools.cache
def one_loss_on_one_device(mapper: Variant) -> tuple[Any, Any, Any]:
    """The parameters of a variant, the loss of its WIDE batch and the gradients of what it trains."""
    model = ClipCap(clipcap_config(mapper=mapper, dropout=0.0))
    params = random_params(model, 0, WIDE["inputs"], WIDE["tokens"])

    def loss(trained: Any) -> jax.Array:
        logits = model.apply({"params": {**params, **trained}}, WIDE["inputs"], WIDE["tokens"])
        real = np.arange(7)[None] < WIDE["lengths"][:, None]
        return optax.softmax_cross_entropy_with_integer_labels(logits[real], WIDE["tokens"][real]).mean()

    return params, *jax.jit(jax.value_and_grad(loss))({name: params[name] for name in VARIANTS[mapper]})


@pytest.mark.parametrize(("layout", "accumulation", "remat"), CASES)
@pytest.mark.parametrize("mapper", VARIANTS)
def test_every_layout_gives_what_one_loss_on_one_device_gives(
    mapper: Variant, layout: parallel.Layout, accumulation: int, remat: bool
) -> None:
    params, expected, gradients = one_loss_on_one_device(mapper)
    trainable = VARIANTS[mapper]
    step = make_step(
        ClipCap(clipcap_config(mapper=mapper, dropout=0.0)),
        keep_gradients(),
        SCHEDULE,
        settings(trainable=trainable, accumulation=accumulation, remat=remat),
        layout=layout,
    )
    trained = {name: params[name] for name in trainable}
    state = TrainState(jnp.int32(0), trained, None, keep_gradients().init(trained))
    frozen = {name: part for name, part in params.items() if name not in trainable}
    state, metrics = layout.map_step(step)(jax.tree.map(np.asarray, state), frozen, WIDE)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_close(named(state.opt_state), named(gradients))
    assert_close(named(state.params), named(jax.tree.map(lambda param, grad: param - 0.1 * grad, trained, gradients)))
    if isinstance(layout, parallel.FullySharded):
        for name, leaf in named((state.params, state.opt_state)).items():
            divisible = any(size % 2 == 0 for size in leaf.shape)  # 2 or 4 devices
            assert leaf.is_fully_replicated != divisible, name


def test_gradients_summed_in_bfloat16() -> None:
    """They are those of float32 but for 8 bits of mantissa, and what follows is float32 again."""
    params, expected, gradients = one_loss_on_one_device("mlp")
    model = ClipCap(clipcap_config(dropout=0.0))
    step = make_step(model, keep_gradients(), SCHEDULE, settings(gradient_dtype="bfloat16"))
    state, metrics = parallel.map_step(step)(start(params), {}, WIDE)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    found, exact = named(state.opt_state), named(gradients)
    for name, gradient in exact.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=2**-6 * np.abs(gradient).max(), err_msg=name)
    assert any(np.any(found[name] != gradient) for name, gradient in exact.items())


@pytest.mark.parametrize(
    ("mapper", "dtype", "remat"),
    [("mlp", "bfloat16", False), pytest.param("transformer", "float32", True, marks=pytest.mark.slow)],
)
def test_a_sharded_step_gathers_one_layer_at_a_time(
    mapper: Variant, dtype: Literal["float32", "bfloat16"], remat: bool
) -> None:
    """And nothing of the batch: all that is gathered is a parameter, or one layer's slice of it."""
    config = clipcap_config(mapper=mapper, dtype=dtype, vocab_size=12)  # a size that four devices divide
    config = dataclasses.replace(
        config,
        mapper=dataclasses.replace(config.mapper, layers=5),
        gpt2=dataclasses.replace(config.gpt2, layers=5),
    )
    model, layout = ClipCap(config), FSDP()
    rows = 44  # in all, of which a device has 11: neither is a size of a parameter
    batch = {"inputs": random_embeddings(0, rows), "tokens": random_tokens(0, rows, 7), "lengths": np.full(rows, 7)}
    params = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"], batch["tokens"])["params"]
    optimizer = optax.adamw(0.1)
    state = jax.eval_shape(lambda params: TrainState(jnp.int32(0), params, None, optimizer.init(params)), params)
    train = settings(trainable=("mapper", "gpt2"), remat=remat)
    program = layout.map_step(make_step(model, optimizer, SCHEDULE, train, layout=layout)).lower(state, {}, batch)
    module = hlo.Module(str(program.compile().as_text()))

    gathered = [visit for visit in module.walk() if visit.instruction.opcode.startswith("all-gather")]
    shapes = {shape.dims for visit in gathered for shape in visit.instruction.shapes}
    layers, alone = set(), set()
    for name, leaf in named(params).items():
        if ".layers." in name:
            layers |= {(1, *leaf.shape[1:]), leaf.shape[1:], (1, *leaf.shape[:0:-1]), leaf.shape[:0:-1]}
        else:  # of the position embeddings, as many as there are positions
            alone |= {leaf.shape, (9, *leaf.shape[1:]), (1, 9, *leaf.shape[1:])}
    assert shapes <= layers | alone
    assert {visit.times for visit in gathered if len(visit.instruction.shapes[0].dims) == 3} == {5}
    # What the forward pass gathered is not kept for the backward pass: loops carry the devices' parts alone.
    kernels = {leaf.shape for name, leaf in named(params).items() if ".layers." in name and name.endswith("kernel")}
    parts = {layout.sharding(jax.ShapeDtypeStruct(shape, np.float32)).shard_shape(shape) for shape in kernels}
    loops = [visit.instruction for visit in module.walk() if visit.instruction.opcode == "while"]
    carried = {shape.dims for loop in loops for shape in loop.shapes}
    assert parts <= carried
    assert not carried & (kernels - parts)


def xl_state_bytes() -> tuple[int, int]:
    """Of gpt2-xl with AdamW: what one of this process's devices holds, and what all parameters, moments and gradients
    take."""
    config = ClipCapConfig(
        clip=None,
        mapper=MapperConfig("mlp", prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.0),
        gpt2=gpt2.PRESETS["gpt2-xl"],
        normalize_embedding=False,
        dtype="bfloat16",
        matmul_precision="default",
    )
    params = param_shapes(ClipCap(config), 640)
    optimizer = optim.optimizer(make_config(Path()).optimizer, 1000)
    state = jax.eval_shape(lambda params: TrainState(jnp.int32(0), params, None, optimizer.init(params)), params)
    layout, here, total = parallel.FullySharded(), 0, 0
    for leaf in jax.tree.leaves((state, params)):  # gradients are as large as parameters
        here += int(np.prod(layout.sharding(leaf).shard_shape(leaf.shape))) * leaf.dtype.itemsize
        total += leaf.size * leaf.dtype.itemsize
    return here, total


def test_gpt2_xl_fits_sixteen_devices() -> None:
    here, total = in_process(xl_state_bytes, devices=16)
    assert total > 16 * 1.5e9
    assert total / 16 <= here < 1.01 * total / 16 < 2 * 2**30  # of 16 GB that a TPU v5e has


def test_the_old_state_is_donated() -> None:
    model = ClipCap(clipcap_config())
    params, optimizer = random_params(model, 0, BATCH["inputs"], BATCH["tokens"]), optax.adamw(0.1)
    old = start(params)._replace(opt_state=parallel.replicate(optimizer.init(params)))
    step = parallel.map_step(make_step(model, optimizer, SCHEDULE, settings(trainable=("mapper", "gpt2"))))
    new, _ = step(old, {}, BATCH)
    assert [name for name, leaf in named(old).items() if not leaf.is_deleted()] == []
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_dropout_differs_by_step_and_by_device() -> None:
    model = ClipCap(clipcap_config(dropout=0.5))
    params = random_params(model, 0, BATCH["inputs"], BATCH["tokens"])
    alike = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), BATCH)

    def losses(dropout: tuple[str, ...]) -> list[float]:
        """Of one caption on one device, on another one, a step later, and as at first."""
        step = parallel.map_step(make_step(model, keep_gradients(), SCHEDULE, settings(trainable=dropout)))
        found = []
        for device, at in ((0, 0), (1, 0), (0, 1), (0, 0)):
            lengths = np.where(np.arange(8) == 2 * device, 7, 0)
            state = start(params)._replace(step=jnp.int32(at))
            found.append(float(step(state, {}, {**alike, "lengths": lengths})[1]["loss"]))
        return found

    one, another, later, again = losses(dropout=("gpt2",))
    assert len({one, another, later}) == 3
    assert one == again
    without = losses(dropout=())
    np.testing.assert_allclose(without, without[0], rtol=1e-6)


def products(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of all matrix products in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


@pytest.mark.parametrize("trainable", [("mapper",), ("gpt2",), ("mapper", "gpt2")])
def test_frozen_parts_get_no_gradients(trainable: tuple[str, ...]) -> None:
    model = ClipCap(clipcap_config())
    params = random_params(model, 0, BATCH["inputs"], BATCH["tokens"])
    trained = {name: params[name] for name in trainable}
    frozen = {name: params[name] for name in params if name not in trainable}
    step = make_step(model, keep_gradients(), SCHEDULE, settings(trainable=()))
    state = TrainState(jnp.int32(0), trained, None, keep_gradients().init(trained))
    one_device = jax.vmap(step, in_axes=(None, None, 0), axis_name=parallel.AXIS, out_axes=None)
    batch = jax.tree.map(lambda x: x[None], BATCH)
    jaxpr, (after, _) = jax.make_jaxpr(one_device, return_shape=True)(state, frozen, batch)
    assert set(after.params) == set(after.opt_state) == set(trainable)
    shapes = products(jaxpr.jaxpr)
    for part in params:
        kernels = {leaf.shape[-2:] for name, leaf in named(params[part]).items() if name.endswith("kernel")}
        gradients = {kernel for kernel in kernels if (1, *kernel) in shapes or (1, *kernel[::-1]) in shapes}
        assert gradients == (kernels if part in trainable else set())


def test_the_originals_targets() -> None:
    """No end token is learnt, and no token 0: the loss is that of the tokens that are left."""
    model = ClipCap(clipcap_config(dropout=0.0))
    params = random_params(model, 0, BATCH["inputs"], BATCH["tokens"])
    logits = model.apply({"params": params}, BATCH["inputs"], BATCH["tokens"])
    real = (np.arange(7)[None] < BATCH["lengths"][:, None]) & (BATCH["tokens"] != 0)
    assert real.sum() < BATCH["lengths"].sum()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[real], BATCH["tokens"][real]).mean()
    step = make_step(model, keep_gradients(), SCHEDULE, settings(trainable=(), targets="original"))
    _, metrics = parallel.map_step(step)(start(params), {}, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
