"""Everything that knows how many devices there are.

Batches are split over devices along their first axis. Parameters and optimiser state are the same on all of them and
stay ordinary arrays, without a device axis (`in_axes=None`, `out_axes=None`); or, of a model that is too large for
that, each device holds a part of them. A `Layout` is one of the two, for a training step that need not know which.
"""

import collections
import dataclasses
import functools
import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipcap_jax import cluster, files
from clipcap_jax.compiled import Compiled
from clipcap_jax.errors import UserError

AXIS = "data"
STEP = "the training step for captions of this length"
PROGRAM = "a program"


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs on disk, so that the next process starts without compiling them again.

    They go to where JAX's own setting `JAX_COMPILATION_CACHE_DIR` says, otherwise to `~/.cache/clipcap_jax/<host>`: a
    home folder may be shared by machines that cannot run each other's programs.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = files.home() / platform.node()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # no home folder that can be written to: it works without, only slower
    jax.config.update("jax_compilation_cache_dir", str(folder))


def connect() -> None:
    """Let the devices of several processes find each other, while these are in step: on CPUs JAX waits 30 s for that,
    and one may compile for longer."""
    if cluster.count() > 1:
        cluster.meet()
        jax.block_until_ready(jax.pmap(sum_over_devices, axis_name=AXIS)(flag(True)))


def for_saving(tree: Any) -> Any:
    """Arrays as checkpoints take them, not copied: one that each process has on its own devices as one of all.

    Of what every device of one process holds, one device's: Orbax would have each write a part, and compile a program
    for every shape and device to cut that out.
    """
    if cluster.count() == 1:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0) if leaf.is_fully_replicated else leaf, tree)
    everywhere = jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), (AXIS,)), jax.P())

    def of_all(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable:
            return leaf
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, copies)

    return jax.tree.map(of_all, tree)


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def describe_devices() -> str:
    """Such as "4 TPU v5 lite devices of 15.7 GiB, in 2 processes"."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs do not say
    return (
        f"{count} {kind} device{'s' * (count > 1)}"
        + (f" of {memory / 2**30:.1f} GiB" if memory else "")
        + (f", in {cluster.count()} processes" if cluster.count() > 1 else "")
    )


def check_batch_size(batch_size: int, setting: str, accumulation: int = 1) -> None:
    """Raise a UserError unless a batch divides evenly over the devices, and there into micro-batches."""
    multiple = device_count() * accumulation
    if batch_size < 1 or batch_size % multiple:
        times = f" times config.train.accumulation={accumulation}" if accumulation > 1 else ""
        below = max(0, batch_size // multiple) * multiple
        raise UserError(
            f"{setting} is {batch_size}: it has to be a multiple of the {device_count()} devices{times}, "
            f"such as {f'{below} or ' if below else ''}{below + multiple}. With k times the batch, begin with "
            "sqrt(k) times config.optimizer.learning_rate, and warmup_steps between 1/k and 1 times as many (see "
            "docs/pods.md)"
        )


def round_up(batch_size: int, *, local: bool = False) -> int:
    """The next multiple of the number of devices, or of this process's."""
    count = jax.local_device_count() if local else device_count()
    return -(-batch_size // count) * count


def sum_over_devices(tree: Any) -> Any:
    """Inside a mapped function: every leaf summed over all devices."""
    return jax.lax.psum(tree, AXIS)


def device_index() -> jax.Array:
    """Inside a mapped function: this device's number among all devices."""
    return jax.lax.axis_index(AXIS)


def _everywhere() -> jax.NamedSharding:
    return jax.NamedSharding(_mesh(), jax.P())


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    """This process's devices, along the axis of the mapped functions: under another name, these would be compiled for
    what lies here, and again for what they return."""
    return jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))


def replicate(tree: Any) -> Any:
    """Put a tree of arrays on every device, so that steps need not send it.

    Arrays that lie on a device already are not copied there: whoever donates the result gives them away too.
    """
    return jax.device_put(tree, _everywhere())


def on_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of replicated arrays, whose results are replicated too: they never lie on one device alone before."""
    return jax.jit(function, out_shardings=_everywhere())


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called once, so that to compile it takes longer than to run it: on CPUs half as long as
    otherwise, with the same results."""
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def flag(value: bool) -> np.ndarray:
    """A number of a batch that says the same on each of this process's devices."""
    return np.full(jax.local_device_count(), value, np.float32)


def send(batch: Any) -> Any:
    """Begin to send every device its share of this process's part of a batch.

    The shares lie as the mapped functions take them, which therefore neither send nor copy them again. A batch of
    arrays on the host those send by themselves, and wait for it.
    """
    return jax.device_put(_split(batch), jax.NamedSharding(_mesh(), jax.P(AXIS)))


def send_ahead(batches: Iterator[Any], send: Callable[[Any], Any] = send) -> Iterator[Any]:
    """The batches, sent: each before the one ahead of it is handed out, so that it travels during that one's step."""
    sent = collections.deque(map(send, itertools.islice(batches, 1)))
    for batch in batches:
        sent.append(send(batch))
        yield sent.popleft()
    yield from sent


def _split(batch: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    count = len(devices) if devices else jax.local_device_count()

    def split(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return x
        shape = (count, x.shape[0] // count, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else np.reshape(x, shape)

    return jax.tree.map(split, batch)


def _wait_on_cpu(result: Any) -> Any:
    # Virtual CPU devices share a thread pool: a second step, dispatched while the first waits in a collective, can
    # take the threads that the first needs, and both wait for ever.
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        jax.block_until_ready(result)
    return result


def mapped(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None, *, name: str = PROGRAM, **options: Any
) -> Compiled:
    """Run a function on every device's share of a batch, its last argument, sent or not.

    Args:
      function: called on each device.
      devices: None: this process's.
      name: what it is to a user who waits for the compiler.
      **options: of `jax.pmap`.
    """
    program = jax.pmap(function, axis_name=AXIS, devices=devices, **options)
    return Compiled(name, program, functools.partial(_split, devices=devices), _wait_on_cpu)


def map_step(step: Callable[..., Any], devices: Sequence[jax.Device] | None = None) -> Compiled:
    """Run `step(state, constants, batch) -> (state, metrics)` on every device's share of a batch.

    `step` must return the same on every device, that is: sum over devices whatever depends on the batch. The state is
    donated: its buffers are reused for the new one.
    """
    return mapped(step, devices, name=STEP, in_axes=(None, None, 0), out_axes=None, donate_argnums=0)


def map_sum(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None, *, name: str = PROGRAM
) -> Compiled:
    """Run `function(constants, batch)` on every device's share; its results, summed over devices."""

    def summed(constants: Any, batch: Any) -> Any:
        return sum_over_devices(function(constants, batch))

    return mapped(summed, devices, name=name, in_axes=(None, 0), out_axes=None)


def map_rows(function: Callable[..., Any], *, local: bool = False, name: str = PROGRAM) -> Callable[..., Any]:
    """Run `function(constants, batch)` on every device's share; its results joined along axis 0, on the host.

    Each process gives its own rows, and gets those of all; `local`: it runs alone, on its own devices.
    """
    begin = begin_rows(function, local=local, name=name)
    return lambda constants, batch: begin(constants, batch)()


def begin_rows(
    function: Callable[..., Any], *, local: bool = False, name: str = PROGRAM
) -> Callable[..., Callable[[], Any]]:
    """As `map_rows`, but a call only begins: what it returns, called in turn, waits for the results and gives them."""
    program = mapped(function, jax.local_devices() if local else None, name=name, in_axes=(None, 0))
    alone = local or cluster.count() == 1

    def begin(constants: Any, batch: Any) -> Callable[[], Any]:
        result = program(constants, batch)

        def wait() -> Any:
            rows = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])), jax.device_get(result))
            return rows if alone else multihost_utils.process_allgather(rows, tiled=True)

        return wait

    return begin


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """The layout of a training whose devices hold the same state, and each take a share of the batch.

    Attributes:
      devices: None: all there are.
      by_share: whether a step sees one device's share of the batch, or all of it.
    """

    devices: tuple[jax.Device, ...] | None = None
    by_share: ClassVar[bool] = True

    def place(self, tree: Any) -> Any:
        """A tree of arrays, on the devices as this layout has parameters and what is like them."""
        return replicate(tree)

    def placed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of placed arrays whose results are placed too, and never lie elsewhere before."""
        return on_devices(function)

    def on_every_device(self, tree: Any) -> Any:
        """A placed tree, as `map_sum` and `map_rows` take it: whole, on each of this process's devices."""
        return tree

    def send(self, batch: Any) -> Any:
        """As `send`, for this layout's steps."""
        return send(batch)

    def map_step(self, step: Callable[..., Any]) -> Compiled:
        """Run `step(state, constants, batch) -> (state, metrics)` on placed arrays and a batch, sent or not.

        The state is donated: its buffers are reused for the new one. What follows is called inside the step.
        """
        return map_step(step, self.devices)

    def sum_over_devices(self, tree: Any) -> Any:
        """What depends on the batch that the step sees: for all of the batch."""
        return sum_over_devices(tree)

    def device_index(self) -> jax.Array | int:
        """Which share of the batch the step sees."""
        return device_index()

    def pinned(self, tree: Any) -> Any:
        """The same, placed."""
        return tree

    def rows(self, x: Any) -> Any:
        """The same, each row of the batch where it lies."""
        return x

    def whole(self, tree: Any) -> Any:
        """The same, on every device."""
        return tree


@dataclasses.dataclass(frozen=True)
class FullySharded:
    """The layout of a training whose devices share the state out among them, and gather one layer at a time to use it.

    ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054), as XLA partitions one program for the whole batch. Methods as
    in `DataParallel`.

    Attributes:
      devices: None: all there are.
      whole_below: arrays of fewer bytes are not divided.
    """

    devices: tuple[jax.Device, ...] | None = None
    whole_below: int = 2**20
    by_share: ClassVar[bool] = False

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        # Not of jax.make_mesh, whose axes are explicit: then every operation would have to say how it is divided.
        # An axis for each prime factor of their number: so an array may be divided along several of its own.
        devices = np.array(self.devices or jax.devices())
        factors = _prime_factors(devices.size)
        return jax.sharding.Mesh(devices.reshape(factors), [f"{AXIS}{i}" for i in range(len(factors))])

    @property
    def _whole(self) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, jax.P())

    @property
    def _rows(self) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, jax.P(self.mesh.axis_names))

    def sharding(self, leaf: Any) -> jax.NamedSharding:
        """Of an array, by its shape and type: divided along its largest axis that the number of devices divides.

        Where there is none, along the largest for a factor of that number, and along the next for what is left of it:
        gpt2-xl is 1,600 = 64 x 25 wide, and 256 devices are to have a 256th each.
        """
        if leaf.size * leaf.dtype.itemsize < self.whole_below:
            return self._whole
        left = dict(self.mesh.shape)
        parts: list[tuple[str, ...]] = [()] * len(leaf.shape)
        for axis in sorted(range(len(leaf.shape)), key=lambda i: (leaf.shape[i] % self.mesh.size > 0, -leaf.shape[i])):
            size = leaf.shape[axis]
            for name, factor in list(left.items()):
                if size % factor == 0:
                    size //= factor
                    parts[axis] += (name,)
                    del left[name]
        return jax.NamedSharding(self.mesh, jax.P(*(part or None for part in parts)))

    def place(self, tree: Any) -> Any:
        def place(leaf: Any) -> jax.Array:
            array = np.asarray(leaf)  # of which every device gets its part, whichever process it belongs to
            return jax.make_array_from_callback(array.shape, self.sharding(array), array.__getitem__)

        return jax.tree.map(place, tree)

    def placed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def place(*arguments: Any) -> Any:
            shardings = jax.tree.map(self.sharding, jax.eval_shape(function, *arguments))
            return _wait_on_cpu(jax.jit(function, out_shardings=shardings)(*arguments))

        return place

    def on_every_device(self, tree: Any) -> Any:
        copies = _wait_on_cpu(jax.jit(lambda tree: tree, out_shardings=self._whole)(tree))
        return replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), copies))

    def send(self, batch: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self._rows, leaf), batch)

    def map_step(self, step: Callable[..., Any]) -> Compiled:
        def sent(batch: Any) -> Any:
            there = (jax.Array, jax.ShapeDtypeStruct)
            return batch if all(isinstance(leaf, there) for leaf in jax.tree.leaves(batch)) else self.send(batch)

        return Compiled(STEP, _ShardedStep(step, self), sent, _wait_on_cpu)

    def sum_over_devices(self, tree: Any) -> Any:
        return tree  # it was summed over the whole batch

    def device_index(self) -> int:
        return 0

    def pinned(self, tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, jax.tree.map(self.sharding, tree))

    def rows(self, x: Any) -> Any:
        # Without this, XLA would rather gather the activations of the whole batch than a layer's parameters.
        return jax.lax.with_sharding_constraint(x, self._rows)

    def whole(self, tree: Any) -> Any:
        @jax.custom_vjp
        def gathered(leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, self._whole)

        # A gradient becomes whole nowhere: each device needs only its part of the sum over devices.
        gathered.defvjp(lambda leaf: (gathered(leaf), None), lambda _, cotangent: (self.pinned(cotangent),))
        return jax.tree.map(gathered, tree)

    def keeps(self, primitive: Any, *_: Any, **__: Any) -> bool:
        """A policy of `jax.checkpoint`: what was gathered for the forward pass is gathered again for the backward pass;
        kept, the layers of the forward pass would in the end be the whole model, on every device. `rows` and `whole`
        are these two primitives."""
        return bool(primitive.name not in ("sharding_constraint", "custom_vjp_call"))


def _prime_factors(number: int) -> list[int]:
    """In ascending order; of 1: [1]."""
    factors, factor = [], 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return factors or [1]


Layout = DataParallel | FullySharded
DATA_PARALLEL = DataParallel()
LAYOUTS: dict[str, Callable[[], Layout]] = {"data": DataParallel, "fsdp": FullySharded}


class _ShardedStep:
    """A step of the layout `FullySharded`, compiled when there is a state that says how it is divided."""

    def __init__(self, step: Callable[..., Any], layout: FullySharded):
        self._step, self._layout = step, layout
        self._jitted: Any = None

    def __call__(self, state: Any, constants: Any, batch: Any) -> Any:
        return self._program(state, constants)(state, constants, batch)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As of `jax.jit`'s functions."""
        lowered: jax.stages.Lowered = self._program(*arguments[:2]).lower(*arguments)
        return lowered

    def _program(self, state: Any, constants: Any) -> Any:
        if self._jitted is None:
            layout = self._layout
            placed, constant = (jax.tree.map(layout.sharding, tree) for tree in (state, constants))
            self._jitted = jax.jit(
                self._step,
                in_shardings=(placed, constant, layout._rows),
                out_shardings=(placed, layout._whole),
                donate_argnums=0,
            )
        return self._jitted
