"""What the TPU's compiler makes of this project's programs, for TPUs that need not be there.

    python benchmarks/tpu_compile.py [--topology v5e:2x2x1 ...] [--only training/mlp ...] [--keep FOLDER] [--tiny]

Runs on any x86 machine with libtpu (`pip install "clipcap_jax[tpu]"`) and prints a JSON object a line, of a program:

    hosts        of the chips, each with a process of its own; `partitions`: among how many chips the program is divided
    flops        of one chip, by arithmetic, of all steps of a search
    fits         whether a chip's memory holds it; `memory`, in bytes, as compiled, or how much would have been `needed`
    loops        how often each runs at most, for a search may end sooner; null where that is not known, taken as once
    cycles       how many the compiler expects, and of what most; nothing of collectives and prefetches
    collectives  synchronous, unless there is a start and a done; beside other work, if the schedule has some between;
                 `bytes` of their results, `sent` by one chip (in a ring), and the `largest` array of a single one
    products     those that the compiler left, without what multiplies padding; `float32`: those that read float32
    copies       of more than 1 MB inside loops, transposes among them; `prefetches`: those that run beside other work

What stands below `loops` is read in the compiled program's text (hlo.py): `count` counts instructions there; cycles,
FLOPs and bytes are of one chip and of all times that they run.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hlo
import jax
import programs
from jax.experimental import topologies

from clipcap_jax import parallel
from clipcap_jax.compiled import Compiled

# What libtpu needs to know where there is no TPU, of any kind; and that it need not be the only one that runs here.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = ("v5e:2x2x1", "v5e:4x4x1", "v5e:16x16x1", "v6e:4x4x1", "v5p:2x2x2")
# A chip's, by cloud.google.com/tpu/docs/v5e, v6e and v5p, whose GB are powers of two: of 16, the compiler offers 15.75.
MEMORY = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
TOKENS = 20
BEAMS, LENGTH = 5, 67
PICTURES = 64

Line = dict[str, Any]


class Program(NamedTuple):
    """`mapped(function, devices)` takes `*constants` and a batch; `batch`: the shapes of one chip's share; `details`:
    what its line says of it; `trained`: how many numbers have gradients; `steps`: of a search; `divided`: whether each
    chip holds a part of the constants and gradients."""

    function: Callable[..., Any]
    mapped: Callable[..., Compiled]
    constants: tuple[Any, ...]
    batch: Any
    details: Line
    trained: int = 0
    steps: int = 1
    divided: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES, help="such as v6e:4x4x1: 16 chips of TPU v6e")
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="programs with such names")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write what the compiler makes there, as HLO")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("libtpu"):
        parser.error('this needs libtpu, which has the compiler: pip install "clipcap_jax[tpu]"')
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there would seem to take no time

    seen = set()
    for topology in arguments.topology:
        kind = topology.split(":")[0]
        devices: Sequence[Any] = topologies.get_topology_desc(topology, platform="tpu").devices
        hosts = len({device.process_index for device in devices})
        # Some programs on one topology a kind: what one chip does and holds is the same on all.
        for name, make in cases(len(devices), arguments.tiny, first=kind not in seen):
            if any(part in name for part in arguments.only):
                about = {"topology": topology, "chips": len(devices), "hosts": hosts, "chip": devices[0].device_kind}
                line = {**about, "program": name}
                file = re.sub(r"[:/]", "-", f"{topology}-{name}.txt")
                try:
                    line |= attempt(make(), devices, MEMORY[kind], arguments.keep and arguments.keep / file)
                except Exception as error:
                    traceback.print_exc()
                    line["error"] = f"{type(error).__name__}: {error}"[:500]
                print(json.dumps(line), flush=True)
                jax.clear_caches()
        seen.add(kind)


def cases(chips: int, tiny: bool, first: bool) -> Iterator[tuple[str, Callable[[], Program]]]:
    """Names, and what makes their programs; `first`: also larger GPT-2s, and towers in float32. Over 16 chips the
    largest is divided as well, and where these are not the first of their kind, nothing else is compiled."""
    kinds: tuple[programs.Kind, ...] = ("mlp", "transformer")
    dtypes: tuple[programs.Dtype, ...] = ("bfloat16", "float32")
    sizes, vit, resnet = ("tiny", "tiny ViT", "tiny ResNet") if tiny else ("gpt2", "ViT-B/32", "RN50x4")
    rows = 64 if chips <= 16 else 16  # pairs
    if chips == 16:
        largest = "tiny" if tiny else "gpt2-xl"
        yield f"training/mlp/{largest}/fsdp", functools.partial(training, "mlp", largest, rows, "fsdp")
    if chips == 16 and not first:
        return
    for kind in kinds:
        yield f"training/{kind}/{sizes}", functools.partial(training, kind, sizes, rows)
    yield f"validation/mlp/{sizes}", functools.partial(validation, sizes, rows)
    yield f"captioning/embeddings/{sizes}", functools.partial(captioning, sizes, None)
    yield f"captioning/pixels/{sizes}", functools.partial(captioning, sizes, vit)
    for clip in (vit, resnet):
        for dtype in dtypes if first else dtypes[:1]:
            yield f"embedding/{clip}/{dtype}", functools.partial(embedding, clip, dtype)
    if first and not tiny:
        for sizes in ("gpt2-large", "gpt2-xl"):
            for kind in kinds:
                yield f"training/{kind}/{sizes}", functools.partial(training, kind, sizes, rows)


def training(
    kind: programs.Kind, sizes: str, rows: int, layout: str = "data", dtype: programs.Dtype = "bfloat16"
) -> Program:
    """A step as the trainer maps it, in this layout; if that is "fsdp", with `remat`."""
    model, divided = programs.captioner(kind, sizes, dtype=dtype), layout == "fsdp"
    state, frozen = programs.training_state(model, programs.param_shapes(model))

    def mapped(_: Any, devices: Sequence[Any]) -> Compiled:
        over = (parallel.FullySharded if divided else parallel.DataParallel)(tuple(devices))
        return over.map_step(programs.training_step(model, over, remat=divided))

    return Program(
        programs.training_step(model),
        mapped,
        (state, frozen),
        programs.shapes_of(programs.random_batch(model, rows, TOKENS)),
        {
            "rows": rows,
            "tokens": TOKENS,
            "dtype": dtype,
            "layout": layout,
            "remat": divided,
            "trained": programs.size(state.params),
        },
        trained=programs.size(state.params),
        divided=divided,
    )


def validation(sizes: str, rows: int) -> Program:
    model = programs.captioner("mlp", sizes)
    return Program(
        programs.validation_loss(model),
        parallel.map_sum,
        (programs.param_shapes(model),),
        programs.shapes_of(programs.random_batch(model, rows, TOKENS)),
        {"rows": rows, "tokens": TOKENS, "dtype": "bfloat16"},
    )


def captioning(sizes: str, clip: str | None, dtype: programs.Dtype = "bfloat16") -> Program:
    model = programs.captioner("mlp", sizes, clip, dtype=dtype)
    length = min(LENGTH, model.config.gpt2.positions - model.config.mapper.prefix_length)
    return Program(
        programs.best_captions(model, BEAMS, length),
        functools.partial(parallel.mapped, in_axes=(None, 0)),
        (programs.param_shapes(model),),
        pictures(clip) if clip else jax.ShapeDtypeStruct((PICTURES, programs.EMBEDDING), "float32"),
        {"rows": PICTURES, "clip": clip, "beams": BEAMS, "tokens": length, "dtype": dtype},
        steps=length - 1,
    )


def embedding(clip: str, dtype: programs.Dtype) -> Program:
    return Program(
        programs.embed_pictures(programs.TOWERS[clip], dtype),
        functools.partial(parallel.mapped, in_axes=(None, 0)),
        (programs.tower_shapes(programs.TOWERS[clip]),),
        pictures(clip),
        {"rows": PICTURES, "dtype": dtype},
    )


def pictures(clip: str) -> jax.ShapeDtypeStruct:
    side = programs.TOWERS[clip].image_size
    return jax.ShapeDtypeStruct((PICTURES, side, side, 3), "uint8")


def attempt(
    program: Program, devices: Sequence[Any], memory: int, file: Path | None = None, options: Line | None = None
) -> Line:
    """What a line says of a program on chips of so much memory; `file`: where the compiled one goes; `options`: of the
    compiler."""
    found = programs.products(program.function, *program.constants, program.batch)
    flops = programs.flops(found, looped=False) + program.steps * programs.flops(found, looped=True)
    line = {**program.details, "flops": flops, "available": memory}
    # Gradients are float32, and all there at once, as they are summed over chips before any is used.
    least = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.constants)) + 4 * program.trained
    least //= len(devices) if program.divided else 1
    if least > memory:
        return {**line, "fits": False, "needed": least, "source": "arithmetic: parameters, moments and gradients alone"}

    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(devices) * leaf.shape[0], *leaf.shape[1:]), leaf.dtype), program.batch
    )
    lowered = program.mapped(program.function, devices).lower(*program.constants, batch)
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "Ran out of memory" not in str(error):
            raise
        return {**line, "fits": False, **out_of_memory(str(error))}
    line["compile"] = round(time.monotonic() - start, 1)
    text = str(compiled.as_text())
    if file:
        file.write_text(text)
    used: Any = compiled.memory_analysis()
    sizes = {
        "arguments": used.argument_size_in_bytes,
        "outputs": used.output_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "aliased": used.alias_size_in_bytes,
        "peak": used.peak_memory_in_bytes,
    }
    return {**line, "fits": True, "memory": sizes, **hlo.describe(hlo.Module(text))}


def out_of_memory(message: str) -> Line:
    """From such as "memory required for HLO temporaries (37.29G) exceeds available HBM (15.75G)"."""
    needed, available = (
        round(float(size) * UNITS[unit]) for size, unit in re.findall(r"([\d.]+)([KMG])\b", message)[:2]
    )
    return {"needed": needed, "available": available, "source": message.splitlines()[0][:300]}


if __name__ == "__main__":
    main()
