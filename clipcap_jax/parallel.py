"""Everything that knows how many devices and processes there are.

Batches are split over devices along their first axis; parameters and optimiser state are the same on all of them and
stay ordinary arrays, without a device axis (`in_axes=None`, `out_axes=None`).
"""

import collections
import contextlib
import functools
import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipcap_jax import files
from clipcap_jax.errors import UserError

AXIS = "data"
_TEXT = 4096  # bytes of a message between processes


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


# A process that has not been heard of for as long is taken for lost, and the others end.
_LOST = 60  # seconds
_PATIENCE = 3600  # seconds that the others wait at the end for process 0, which scores and writes


def start(coordinator_address: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Let the processes of a cluster find each other, before any device is used; one alone needs nothing.

    JAX finds them by itself on Cloud TPUs, in SLURM, Open MPI and Kubernetes; elsewhere all three have to be given.

    Args:
      coordinator_address: host and port of process 0, "" where JAX finds it.
      num_processes: how many there are, 0 where JAX finds that.
      process_id: this one's number, from 0; -1 where JAX finds it.

    Raises:
      UserError: they do not find each other, or are fewer than was said.
    """
    given = bool(coordinator_address or num_processes or process_id >= 0)
    try:
        jax.distributed.initialize(
            coordinator_address or None,
            num_processes or None,
            process_id if process_id >= 0 else None,
            heartbeat_timeout_seconds=_LOST,
            shutdown_timeout_seconds=_PATIENCE,
        )
    except ValueError as error:  # no cluster that JAX knows
        if given:
            raise UserError(
                f"the processes cannot start together: {error} Give all of --coordinator_address=HOST:PORT, "
                "--num_processes and --process_id, or none of them."
            ) from error
    except RuntimeError as error:
        raise UserError(f"the processes cannot start together: {error}") from error
    if num_processes and process_count() != num_processes:
        raise UserError(f"{num_processes} processes were to start together, but there are {process_count()}")


def is_main() -> bool:
    """Whether this is the one process that prints, logs and writes files."""
    return process_index() == 0


def agree(error: UserError | None = None) -> None:
    """Called by all processes: raises in all what any of them had to raise, if anything.

    Raises:
      UserError: that of the first process that has one.
    """
    if process_count() == 1:
        if error is not None:
            raise error
        return
    text = np.zeros(_TEXT, np.uint8)
    encoded = np.frombuffer(str(error or "").encode()[:_TEXT], np.uint8)
    text[: len(encoded)] = encoded
    for index, told in enumerate(multihost_utils.process_allgather(text)):
        if told.any():
            said = bytes(told[told != 0]).decode(errors="replace")
            raise error or UserError(f"process {index} of {process_count()}: {said}")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What every process does by itself, before they go on: if one fails, all do, with its message."""
    try:
        yield
    except UserError as error:
        agree(error)
    else:
        agree()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """What process 0 does first, and the others after it: they find it done."""
    if not is_main():
        multihost_utils.sync_global_devices("first")
    yield
    if is_main():
        multihost_utils.sync_global_devices("first")


def for_saving(tree: Any) -> Any:
    """Replicated arrays as checkpoints take them: as they lie, or on the host where one process writes for several."""
    return tree if process_count() == 1 else jax.device_get(tree)


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def process_index() -> int:
    """This process's number, from 0; its devices take that block of every batch."""
    return jax.process_index()


def process_count() -> int:
    """How many processes share every batch."""
    return jax.process_count()


def describe_devices() -> str:
    """Such as "4 cpu devices"."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return f"{count} {kind} device{'s' * (count > 1)}"


def check_batch_size(batch_size: int, setting: str) -> None:
    """Raise a UserError unless a batch divides evenly over the devices."""
    count = device_count()
    if batch_size < 1 or batch_size % count:
        below, above = batch_size // count * count, (max(batch_size, 0) // count + 1) * count
        near = f"{below} or {above}" if below > 0 else str(above)
        raise UserError(
            f"{setting} is {batch_size}: it has to be a multiple of the {count} devices, such as {near}. A larger "
            "batch usually goes with a larger learning rate, by as much or by its square root."
        )


def round_up(batch_size: int) -> int:
    """The next multiple of the number of devices."""
    return -(-batch_size // device_count()) * device_count()


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


def flag(value: bool) -> np.ndarray:
    """A number of a batch that says the same on each of this process's devices."""
    return np.full(jax.local_device_count(), value, np.float32)


def send(batch: Any) -> Any:
    """Begin to send every device its share of this process's part of a batch.

    The shares lie as the mapped functions take them, which therefore neither send nor copy them again. A batch of
    arrays on the host those send by themselves, and wait for it.
    """
    return jax.device_put(_split(batch), jax.NamedSharding(_mesh(), jax.P(AXIS)))


def send_ahead(batches: Iterator[Any]) -> Iterator[Any]:
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


class Mapped:
    """A function that runs on every device's share of a batch, its last argument, sent or not."""

    def __init__(self, function: Callable[..., Any], devices: Sequence[jax.Device] | None = None, **options: Any):
        """`devices`: None: this process's; `options`: of `jax.pmap`."""
        self._devices = devices
        self._mapped = jax.pmap(function, axis_name=AXIS, devices=devices, **options)

    def __call__(self, *arguments: Any) -> Any:
        *constants, batch = arguments
        return _wait_on_cpu(self._mapped(*constants, _split(batch, self._devices)))

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As of `jax.jit`'s functions: the program for such arguments, or for their shapes, not run; so `devices` may
        be ones that are not here."""
        *constants, batch = arguments
        return self._mapped.lower(*constants, _split(batch, self._devices))


def map_step(step: Callable[..., Any], devices: Sequence[jax.Device] | None = None) -> Mapped:
    """Run `step(state, constants, batch) -> (state, metrics)` on every device's share of a batch.

    `step` must return the same on every device, that is: sum over devices whatever depends on the batch. The state is
    donated: its buffers are reused for the new one.
    """
    return Mapped(step, devices, in_axes=(None, None, 0), out_axes=None, donate_argnums=0)


def map_sum(function: Callable[..., Any], devices: Sequence[jax.Device] | None = None) -> Mapped:
    """Run `function(constants, batch)` on every device's share; its results, summed over devices."""

    def summed(constants: Any, batch: Any) -> Any:
        return sum_over_devices(function(constants, batch))

    return Mapped(summed, devices, in_axes=(None, 0), out_axes=None)


def map_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function(constants, batch)` on every device's share; its results joined along axis 0, on the host.

    Each process gives its own rows, and gets those of all.
    """
    begin = begin_rows(function)
    return lambda constants, batch: begin(constants, batch)()


def _of_all_processes(rows: Any) -> Any:
    return rows if process_count() == 1 else multihost_utils.process_allgather(rows, tiled=True)


def begin_rows(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """As `map_rows`, but a call only begins: what it returns, called in turn, waits for the results and gives them."""
    mapped = Mapped(function, in_axes=(None, 0))

    def begin(constants: Any, batch: Any) -> Callable[[], Any]:
        result = mapped(constants, batch)
        return lambda: _of_all_processes(
            jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])), jax.device_get(result))
        )

    return begin
