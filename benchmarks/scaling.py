"""What a training step costs more over several devices and processes: time here, exchanges and memory as compiled.

    python benchmarks/scaling.py [--only steps/ bytes/cpu memory/cpu/gpt2/] [--tiny]

Prints a JSON object a line; `--only` names the cases by parts of their names, and "" means all. Those with "/tpu/" need
libtpu (`pip install "clipcap_jax[tpu]"`), and minutes each, as do the larger models. LAYOUT is "data" or "fsdp".

    steps/LAYOUT/PxD        a step of a small model, P processes with D virtual CPU devices each, always the same batch:
                            they share this machine's cores, so what more of them take longer is overhead. `seconds` of
                            the fastest of five, as whatever else the machine does adds to it, with their `spread`;
                            `busy`, core-seconds of all processes, which do not depend on that as much
    bytes/FOR/LAYOUT/N      what a device sends to others in a step over N devices, if they form a ring, and the least
                            that it would have to (`formula`); FOR is the compiler, of CPUs ("cpu") or TPU v5e ("tpu")
    memory/FOR/MODEL/LAYOUT/N   bytes of a device, as compiled: arguments (parameters, moments and the batch), outputs,
                            what of these is the arguments' (`aliased`), and temporaries

All train the MLP mapper and GPT-2 with AdamW; "fsdp" for bytes and memory with `remat`. The compiler for CPUs differs
from that for TPUs: it computes in float32 what is bfloat16, and has no reduce-scatter.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import programs
import tpu_compile
from jax.experimental import topologies

from clipcap_jax import cluster, parallel

DEFAULT = ("steps/", "bytes/cpu/", "memory/cpu/gpt2/")
LAYOUTS = ("data", "fsdp")
BATCH, ROWS = 64, 64  # pairs: of a whole step that is measured, of one device where a step is only compiled
WARM_UP, STEPS = 2, 5
TOPOLOGIES = {4: "v5e:2x2x1", 8: "v5e:2x4x1", 16: "v5e:4x4x1"}
MOST = 256  # virtual devices

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=DEFAULT, metavar="SUBSTRING", help="cases with such names")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    # Of a process whose steps are measured; it is this script that starts it.
    parser.add_argument("--layout", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cluster", nargs=3, default=("", "1", "0"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # A program from there would seem to take no time; and of two processes one may read what the other still writes.
    jax.config.update("jax_enable_compilation_cache", False)
    if arguments.layout:
        address, processes, index = arguments.cluster
        work(arguments.layout, arguments.tiny, address, int(processes), int(index))
        return
    os.environ.update(tpu_compile.ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MOST)
    for name, measure in cases(arguments.tiny):
        if any(part in name for part in arguments.only):
            print(json.dumps({"case": name, **measure()}), flush=True)


def cases(tiny: bool) -> Iterator[tuple[str, Callable[[], Line]]]:
    """Names, and what makes the rest of their lines."""
    for layout in LAYOUTS:
        for processes, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)):
            name = f"steps/{layout}/{processes}x{devices}"
            yield name, functools.partial(time_steps, layout, processes, devices, tiny)
    compilers: tuple[tuple[str, programs.Dtype], ...] = (("cpu", "float32"), ("tpu", "bfloat16"))
    for compiler, dtype in compilers:
        for layout in LAYOUTS:
            for count in (4, 8):
                program = functools.partial(
                    tpu_compile.training, "mlp", "tiny" if tiny else "gpt2", ROWS, layout, dtype
                )
                yield f"bytes/{compiler}/{layout}/{count}", functools.partial(count_bytes, program, compiler, count)
    # By data parallelism a device holds the same whatever their number.
    counts = {"cpu": {"data": (1, 8), "fsdp": (8, 64, 256)}, "tpu": {"data": (4,), "fsdp": (4, 16)}}
    for compiler, _ in compilers:
        for sizes in ("tiny",) if tiny else ("gpt2", "gpt2-large", "gpt2-xl"):
            for layout in LAYOUTS:
                for count in counts[compiler][layout]:
                    program = functools.partial(tpu_compile.training, "mlp", sizes, ROWS, layout)
                    name = f"memory/{compiler}/{sizes}/{layout}/{count}"
                    yield name, functools.partial(count_memory, program, compiler, count)


def time_steps(layout: str, processes: int, devices: int, tiny: bool) -> Line:
    """What so many processes print of their steps: the first's, and how busy all of them were."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, str(Path(__file__)), f"--layout={layout}", *(["--tiny"] if tiny else [])]
    started = [
        subprocess.Popen(
            [*command, "--cluster", address, str(processes), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        printed = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"{processes} processes with {devices} devices each failed; why, they have said above")
    lines = [json.loads(text.splitlines()[-1]) for text in printed]  # above them, what gloo says
    return {**lines[0], "busy": sum(line["busy"] for line in lines)}


def work(name: str, tiny: bool, address: str, processes: int, index: int) -> None:
    """Train as one of these processes, and print how long a step takes."""
    if processes > 1:
        cluster.start(address, processes, index)
        parallel.connect()
    layout = parallel.LAYOUTS[name]()
    model = programs.captioner("mlp", "tiny" if tiny else "small", dtype="float32")
    params = programs.random_params(programs.param_shapes(model))
    state, frozen = (layout.place(tree) for tree in programs.training_state(model, params))
    rows = BATCH // processes
    batch = {
        key: array[index * rows : (index + 1) * rows]
        for key, array in programs.random_batch(model, BATCH, programs.TOKENS).items()
    }
    step = layout.map_step(programs.training_step(model, layout))
    seconds, busy = [], []
    for _ in range(WARM_UP + STEPS):
        start, began = time.monotonic(), time.process_time()
        state, metrics = step(state, frozen, layout.send(batch))
        jax.block_until_ready((state, metrics))
        seconds.append(time.monotonic() - start)
        busy.append(time.process_time() - began)
    measured = seconds[WARM_UP:]
    line = {
        "processes": processes,
        "devices": parallel.device_count(),
        "cores": os.cpu_count(),
        "batch": BATCH,
        "trained": programs.size(state.params),
        "seconds": min(measured),
        "spread": [min(measured), max(measured)],
        "busy": min(busy[WARM_UP:]),
    }
    print(json.dumps(line), flush=True)
    if processes > 1:
        cluster.leave()


def compile_for(compiler: str, count: int, program: tpu_compile.Program) -> Line:
    """What `tpu_compile.py` says of a program, for so many TPUs or virtual CPU devices."""
    if compiler == "tpu":
        devices: Sequence[Any] = topologies.get_topology_desc(TOPOLOGIES[count], platform="tpu").devices
        line = tpu_compile.attempt(program, devices, tpu_compile.MEMORY["v5e"])
    else:
        # Instructions for the machine are not optimised: that takes half of the time, and changes nothing else.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        line = tpu_compile.attempt(program, jax.devices()[:count], sys.maxsize, options=options)
    jax.clear_caches()
    return line


def count_bytes(make: Callable[[], tpu_compile.Program], compiler: str, count: int) -> Line:
    program = make()
    line = compile_for(compiler, count, program)
    least, formula = least_sent(program, count)
    sent = sum(found["sent"] for found in line["collectives"])
    kept = {key: line[key] for key in ("rows", "dtype", "layout", "remat", "trained", "compile", "collectives")}
    return {**kept, "sent": sent, "least": least, "formula": formula}


def least_sent(program: tpu_compile.Program, count: int) -> tuple[int, str]:
    """The bytes that a device has to send in a step over so many, in a ring, and how that is reckoned."""
    others, params = count - 1, jax.tree.leaves(program.constants[0].params)
    if not program.divided:
        # The loss and the number of tokens are summed with the gradients.
        return 2 * others * 4 * (
            program.trained + 2
        ) // count, "2(n-1)/n x 4 x (trained + 2): one all-reduce in float32"
    layout = parallel.FullySharded(tuple(jax.devices()[:count]))
    divided = sum(leaf.size for leaf in params if not layout.sharding(leaf).is_fully_replicated)
    width = 4 if program.details["dtype"] == "float32" else 2
    return (
        others * (3 * width * divided + 2 * 4 * (program.trained - divided)) // count,
        f"(n-1)/n x (3 x {width} x {divided} + 2 x 4 x {program.trained - divided}): of the divided parameters two "
        f"all-gathers and a reduce-scatter in {program.details['dtype']}, of the others an all-reduce in float32",
    )


def count_memory(make: Callable[[], tpu_compile.Program], compiler: str, count: int) -> Line:
    line = compile_for(compiler, count, make())
    kept = ("rows", "dtype", "layout", "remat", "trained", "compile", "fits", "memory", "needed", "available", "source")
    return {key: line[key] for key in kept if key in line and not (key == "available" and compiler == "cpu")}


if __name__ == "__main__":
    main()
