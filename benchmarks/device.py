"""What one device makes of this project, and of PyTorch, in six minutes.

    python benchmarks/device.py [--only training/mlp ...] [--seconds 1] [--limit 340] [--dtype float32] [--tiny]

Prints a JSON object a line for every case, the most important ones first; of a case that fails, its error. Needs jax,
flax, optax and numpy, and for the baselines torch and transformers; what is missing costs the cases that need it alone.
`performance.py` makes the tables of docs/performance.md from such lines.

    device       what it is, and its rates: a large product, a copy
    parity       logits, gradients and captions of the original's own tensors (tests/data/original); steps repeated
    training     both variants of the paper; PyTorch as the original has it, and compiled with autocast
    captioning   beams of 5, 20 tokens; the original's loop, and transformers' `generate`
    towers       uint8 pixels to embeddings
    variants     other forms of what training computes, each one change (variants.py)
    lengths      training on each length that captions of COCO are padded to

`seconds` are the median of several calls, `spread` their fastest and slowest. `floor` are the least seconds that the
products, and where it binds the memory, would take at the device's own rates, and `share` is floor / seconds. `peak`
is in bytes: of one program where it is ours, of all that torch held where it is theirs.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BATCHES = (256, 40, 1024)
PICTURES = (32, 128, 1, 512)
BEAMS, LENGTH = 5, 20
COMPILED_AT_ONCE = 4  # programs
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")

Line = dict[str, Any]


class Settings(NamedTuple):
    """`seconds`: how long a case is measured; `dtype`: what is computed in, "" for bfloat16, on CPUs float32; `tiny`:
    whether sizes are those of a test; `commit`: of the code, where there is no git to ask."""

    seconds: float
    dtype: str
    tiny: bool
    commit: str


class Case(NamedTuple):
    """`run` makes its line; `lower`, if any, the program that has to be compiled before, which `run` then gets."""

    name: str
    run: Callable[..., Line]
    lower: Callable[[], Any] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="START", help="cases whose names start so")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each case is measured, at least one call")
    parser.add_argument("--limit", type=float, default=340.0, help="seconds after which it ends")
    parser.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="[bfloat16; on CPUs float32]")
    parser.add_argument("--commit", default="", help="of the code, where there is no git to ask")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--skip", type=int, help=argparse.SUPPRESS)  # this process is the one that works
    arguments = parser.parse_args()
    settings = Settings(arguments.seconds, arguments.dtype, arguments.tiny, arguments.commit)
    if arguments.skip is None:
        supervise(sys.argv[1:], arguments.limit)
    else:
        chosen = [case for case in cases(settings) if case.name.startswith(tuple(arguments.only))]
        run_cases(chosen, arguments.skip, show)


def show(line: Line) -> None:
    print(json.dumps(line), flush=True)


def supervise(arguments: Sequence[str], limit: float) -> None:
    """Run the cases in another process, and start it anew behind a case that it dies of."""
    end = time.monotonic() + limit
    skip = 0
    while True:
        lines: queue.Queue[str | None] = queue.Queue()
        worker = start_worker([*arguments, f"--skip={skip}"], lines)
        running: Line = {"case": "start"}
        try:
            while text := lines.get(timeout=max(0.1, end - time.monotonic())):
                line = json.loads(text)
                if "begin" in line:
                    running, skip = {"case": line["begin"]}, line["number"] + 1
                else:
                    show(line)
        except queue.Empty:
            show({**running, "error": f"not finished after {limit:.0f} seconds; what follows was not begun"})
            worker.kill()
            return
        if worker.wait() == 0:
            return
        show({**running, "error": f"the process died: exit status {worker.returncode}"})
        if running["case"] == "start":
            sys.exit(1)


def start_worker(arguments: Sequence[str], lines: "queue.Queue[str | None]") -> "subprocess.Popen[str]":
    """A process whose JSON lines arrive in the queue, and None at its end; its other output goes to standard error."""
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch is on the same device
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    worker = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )

    def read() -> None:
        assert worker.stdout is not None
        for text in worker.stdout:
            if text.startswith("{"):
                lines.put(text)
            else:
                sys.stderr.write(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return worker


def run_cases(chosen: Sequence[Case], skip: int, emit: Callable[[Line], None]) -> None:
    """Run the cases from number `skip` on, part by part: first a part's programs are compiled, several at once, and
    nothing is measured meanwhile."""
    began = time.monotonic()
    parts: dict[str, list[tuple[int, Case]]] = {}
    for number, case in enumerate(chosen):
        if number >= skip:
            parts.setdefault(case.name.split("/")[0], []).append((number, case))
    for part in parts.values():
        compiled = {}
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            for number, case in part:  # traced one at a time, as variants change the code meanwhile
                if case.lower:
                    compiled[number] = attempt(begin_compiling, pool, case.lower)
        for number, case in part:
            emit({"begin": case.name, "number": number})
            line = attempt(run_case, case, compiled.get(number))
            emit({"case": case.name, "at": round(time.monotonic() - began, 1), **line})
            gc.collect()
            if torch := sys.modules.get("torch"):
                torch.cuda.empty_cache()


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or a line with its error, whose traceback goes to standard error."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def begin_compiling(pool: ThreadPoolExecutor, lower: Callable[[], Any]) -> "Future[tuple[Any, float]]":
    return pool.submit(timed_compile, lower())


def timed_compile(lowered: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return lowered.compile(), time.monotonic() - start


def run_case(case: Case, compiled: Any) -> Line:
    if case.lower is None:
        return case.run()
    if isinstance(compiled, dict):
        return compiled  # the error of tracing it
    program, seconds = compiled.result()
    memory = program.memory_analysis()
    return {**case.run(program), "compile": round(seconds, 1), "peak": getattr(memory, "peak_memory_in_bytes", None)}


def measure(work: Callable[[], Any], wait: Callable[[Any], object], seconds: float) -> Line:
    """The median time of `work`, called again and again without waiting in between, in up to 5 rounds."""

    def round_of(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = work()
        wait(result)
        return (time.perf_counter() - start) / calls

    first, once = round_of(1), round_of(1)
    calls = max(1, int(seconds / 5 / once))
    times = [once] if once > seconds else [round_of(calls) for _ in range(max(1, min(5, round(seconds / once))))]
    return {"seconds": statistics.median(times), "spread": [min(times), max(times)], "calls": calls, "first": first}


def rated(line: Line, count: int, floor: float | None = None) -> Line:
    """With how many units a second that is, and how near to the floor."""
    rate = {"rate": count / line["seconds"]}
    return {**line, **rate, **({"floor": floor, "share": floor / line["seconds"]} if floor else {})}


# The cases. What they need is imported where it is used, as it may be missing.


def cases(settings: Settings) -> list[Case]:
    """All of them, the most important first."""
    made: list[Case] = [Case("device", functools.partial(describe, settings))]
    for part in (parity, training, captioning, towers, variants, lengths):
        made += part(settings)
    return made


def dtype_of(settings: Settings) -> Any:
    import jax

    return settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def describe(settings: Settings) -> Line:
    import jax

    device = jax.devices()[0]
    rates = machine(settings)
    return {
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": settings.commit or output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "dtype": dtype_of(settings),
        "product": rates.product,
        "copy": rates.copy,
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def output_of(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return None


def version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


@functools.cache
def machine(settings: Settings) -> Any:
    """The device's rates, of random numbers: on zeros, products can be faster."""
    import jax
    import jax.numpy as jnp
    from programs import Machine

    width = 512 if settings.tiny else 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype_of(settings)))
    product = measure(functools.partial(jax.jit(jnp.matmul), matrix, matrix), jax.block_until_ready, settings.seconds)
    numbers = jnp.ones((16 * width, width), jnp.float32)  # 4 GB on a GPU
    # Negated, as a copy alone may be left out.
    copy = measure(functools.partial(jax.jit(jnp.negative), numbers), jax.block_until_ready, settings.seconds)
    return Machine(2 * width**3 / product["seconds"], 2 * numbers.nbytes / copy["seconds"])


def parity(settings: Settings) -> list[Case]:
    made = []
    for kind in ("mlp", "transformer"):
        for dtype in ("float32", "bfloat16"):
            made.append(Case(f"parity/{kind}/{dtype}", functools.partial(compare_with_original, kind, dtype)))
    for deterministic in (False, True):
        name = "parity/repeated" + ("/deterministic" if deterministic else "")
        made.append(Case(name, functools.partial(repeat_steps, settings, deterministic)))
    return made


def compare_with_original(kind: str, dtype: str) -> Line:
    """Differences as a share of the largest value, and how many captions are the same, token by token."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from original import Original

    from clipcap_jax.decode import DecodeConfig, beam_search
    from clipcap_jax.loss import caption_loss
    from clipcap_jax.models.clipcap import ClipCap

    original = Original.load(kind)
    arrays, sizes = original.arrays, original.sizes
    model = ClipCap(dataclasses.replace(original.config, dtype=dtype))
    tokens, mask = jnp.asarray(arrays["tokens"]), arrays["token_mask"] > 0

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, arrays["clip_embedding"], tokens)
        total, count = caption_loss(logits, tokens, jnp.full(len(tokens), tokens.shape[1]), targets="original")
        return total / count, logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(original.params)
    decode = DecodeConfig(sizes["beam_size"], sizes["entry_length"], length_penalty=1.0, stop="")
    search = functools.partial(beam_search, model, config=decode, end_token=sizes["stop_token"])
    found = jax.device_get(jax.jit(search)(original.params, arrays["clip_embedding"]))
    same = sum(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected["beams"]
        for tokens, lengths, expected in zip(found.tokens, found.lengths, sizes["generation"], strict=True)
    )

    def difference(actual: Any, expected: Any) -> float:
        return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())

    differences = jax.tree.map(difference, gradients["mapper"], original.mapper_gradients)
    line = {
        "logits": difference(logits[mask], arrays["logits"][:, sizes["prefix_length"] - 1 : -1][mask]),
        "loss": difference(value, arrays["loss"]),
        "gradients": max(jax.tree.leaves(differences)),
        "beams": f"{same} of {len(sizes['generation'])}",
    }
    if dtype == "bfloat16":
        return line
    tolerance = 1e-5
    exact = max(line["logits"], line["loss"], line["gradients"]) <= tolerance and same == len(sizes["generation"])
    return {**line, "tolerance": tolerance, "passed": exact}


def repeat_steps(settings: Settings, deterministic: bool) -> Line:
    """Whether three steps from the same state give the same bits, twice."""
    import jax
    import numpy as np
    import programs

    model = programs.captioner("mlp", "tiny" if settings.tiny else "gpt2", dtype=dtype_of(settings))
    params = random_params(model)
    batch = programs.random_batch(model, 8 if settings.tiny else 40, programs.TOKENS)
    mapped, arguments = place(model, params, batch)
    options = {"xla_gpu_deterministic_ops": True} if deterministic else None
    step = mapped.lower(*arguments).compile(compiler_options=options)

    def run() -> list[Any]:
        state, frozen, sent = place(model, params, batch)[1]
        losses = []
        for _ in range(3):
            state, metrics = step(state, frozen, sent)
            losses.append(metrics["loss"])
        return jax.device_get([losses, jax.tree.leaves(state.params)])

    (first, one), (second, other) = run(), run()
    differing = [np.mean(a != b) for a, b in zip(one, other, strict=True)]
    return {"losses_equal": first == second, "parameters_differing": float(np.max(differing)), "loss": float(first[-1])}


@functools.lru_cache(maxsize=4)
def random_params(model: Any) -> Any:
    import programs

    return programs.random_params(programs.param_shapes(model))


def place(model: Any, params: Any, batch: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """The mapped step of training, and its arguments on the device."""
    import programs

    from clipcap_jax import parallel

    mapped = parallel.map_step(programs.training_step(model))
    state, frozen = parallel.replicate(programs.training_state(model, params))
    return mapped, (state, frozen, parallel.send(batch))


def training(settings: Settings) -> list[Case]:
    made = []
    kinds, batches = ("mlp", "transformer"), (8,) if settings.tiny else BATCHES
    for kind in kinds:
        for batch in batches:
            made.append(training_case(f"training/{kind}/{batch}/ours", settings, kind, batch))
    for batch in batches:
        for kind in kinds:
            for compiled in (False, True):
                name = f"training/{kind}/{batch}/{'compiled' if compiled else 'original'}"
                made.append(Case(name, functools.partial(train_torch, settings, kind, batch, compiled)))
    return made


def training_case(
    name: str,
    settings: Settings,
    kind: Any,
    batch_size: int,
    tokens: int | None = None,
    change: Callable[[], Any] = contextlib.nullcontext,
) -> Case:
    """Steps of training, traced while `change()` is entered."""

    @functools.cache
    def mapped() -> tuple[Any, Any, Any]:
        import programs

        from clipcap_jax import parallel

        model = programs.captioner(kind, "tiny" if settings.tiny else "gpt2", dtype=dtype_of(settings))
        batch = programs.random_batch(model, batch_size, tokens or programs.TOKENS)
        return model, batch, parallel.map_step(programs.training_step(model))

    def lower() -> Any:
        import programs

        model, batch, step = mapped()
        with change():
            return step.lower(*programs.training_state(model, programs.param_shapes(model)), programs.shapes_of(batch))

    def run(program: Any) -> Line:
        import jax
        import programs

        model, batch, _ = mapped()
        found = programs.products(
            programs.training_step(model),
            *programs.training_state(model, programs.param_shapes(model)),
            programs.shapes_of(batch),
        )
        _, (state, frozen, sent) = place(model, random_params(model), batch)
        floor = programs.training_floor(machine(settings), programs.flops(found), programs.size(state.params))

        def work() -> Any:
            nonlocal state
            state, metrics = program(state, frozen, sent)
            return metrics["loss"]

        line = measure(work, jax.block_until_ready, settings.seconds)
        return {
            **rated(line, batch_size, floor),
            "unit": "pairs",
            "tokens": batch["tokens"].shape[1],
            "flops": programs.flops(found),
            "loss": float(work()),
        }

    return Case(name, run, lower)


@functools.lru_cache(maxsize=3)
def torch_captioner(settings: Settings, kind: Any, use: str) -> Any:
    """One for each use, as training changes the weights."""
    import baselines
    import programs
    import torch

    model = programs.captioner(kind, "tiny" if settings.tiny else "gpt2", dtype=dtype_of(settings))
    arrays = programs.original_arrays(model, random_params(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return baselines.Captioner(model.config, arrays, programs.EMBEDDING).to(device)


def train_torch(settings: Settings, kind: Any, batch_size: int, compiled: bool) -> Line:
    import baselines
    import programs
    import torch

    torch.set_float32_matmul_precision("high")  # TF32, which was PyTorch's default when the original was written
    theirs = torch_captioner(settings, kind, "training")
    model = programs.captioner(kind, "tiny" if settings.tiny else "gpt2")
    batch = programs.random_batch(model, batch_size, programs.TOKENS)
    tokens = programs.TOKENS if compiled else programs.ORIGINAL_TOKENS
    step = baselines.training_step(
        theirs,
        batch,
        tokens,
        trains_gpt2="gpt2" in programs.TRAINABLE[kind],
        compiled=compiled,
        autocast=compiled and dtype_of(settings) == "bfloat16",
    )
    reset_peak()
    line = measure(step, wait_for_torch, settings.seconds)
    return {**rated(line, batch_size), "unit": "pairs", "tokens": tokens, "loss": float(step()), "peak": peak()}


def wait_for_torch(_: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def captioning(settings: Settings) -> list[Case]:
    counts = (2,) if settings.tiny else PICTURES
    made = [
        Case("captioning/same", functools.partial(compare_captions, settings, counts[0] if settings.tiny else 8)),
        *(captioning_case(settings, count) for count in counts),
        Case("captioning/1/original", functools.partial(search_torch, settings, 1, "original")),
    ]
    for count in counts:
        made.append(Case(f"captioning/{count}/generate", functools.partial(search_torch, settings, count, "generate")))
    return made


def compare_captions(settings: Settings, count: int) -> Line:
    """How many captions are the original's, token by token, both in float32 at the highest precision."""
    import jax
    import numpy as np
    import programs
    import torch

    torch.set_float32_matmul_precision("highest")
    model = programs.captioner("mlp", "tiny" if settings.tiny else "gpt2", dtype="float32")
    embeddings = programs.random_embeddings(count)
    ours = jax.jit(programs.best_captions(model, BEAMS, LENGTH))(random_params(model), embeddings).tokens
    theirs = torch_captioner(settings, "mlp", "captioning").eval()
    rows = torch.from_numpy(embeddings).to(next(theirs.parameters()).device)
    expected = np.stack([theirs.search(row[None], BEAMS, LENGTH).numpy(force=True) for row in rows])
    return {"same": int((np.asarray(ours) == expected).all(axis=1).sum()), "of": count}


def captioning_case(settings: Settings, count: int) -> Case:
    @functools.cache
    def search() -> tuple[Any, Any]:
        import jax
        import programs

        model = programs.captioner("mlp", "tiny" if settings.tiny else "gpt2", dtype=dtype_of(settings))
        return model, jax.jit(programs.best_captions(model, BEAMS, LENGTH))

    def lower() -> Any:
        import programs

        model, best = search()
        return best.lower(programs.param_shapes(model), programs.shapes_of(programs.random_embeddings(count)))

    def run(program: Any) -> Line:
        import jax
        import programs

        model, best = search()
        embeddings = jax.device_put(programs.random_embeddings(count))
        params = jax.device_put(random_params(model))
        found = programs.products(best, programs.param_shapes(model), programs.shapes_of(embeddings))
        floor = programs.captioning_floor(machine(settings), model, found, count, BEAMS, LENGTH)
        line = measure(lambda: program(params, embeddings).tokens, jax.block_until_ready, settings.seconds)
        return {**rated(line, count, floor), "unit": "captions"}

    return Case(f"captioning/{count}/ours", run, lower)


def search_torch(settings: Settings, count: int, way: str) -> Line:
    import copy

    import programs
    import torch

    torch.set_float32_matmul_precision("high")
    theirs = torch_captioner(settings, "mlp", "captioning").eval()
    if way == "generate":
        theirs = copy.deepcopy(theirs).to(getattr(torch, dtype_of(settings)))
    parameter = next(theirs.parameters())
    rows = torch.from_numpy(programs.random_embeddings(count)).to(parameter.device, parameter.dtype)
    reset_peak()
    search = theirs.search if way == "original" else theirs.generate
    with torch.inference_mode():
        line = measure(lambda: search(rows, BEAMS, LENGTH), wait_for_torch, settings.seconds)
    return {**rated(line, count), "unit": "captions", "peak": peak()}


def towers(settings: Settings) -> list[Case]:
    names = ("tiny ViT", "tiny ResNet") if settings.tiny else ("ViT-B/32", "RN50x4")
    count = 2 if settings.tiny else 256
    ours = [tower_case(settings, name, count) for name in names]
    return ours + [
        Case(f"towers/{name.replace('/', '-')}/torch", functools.partial(embed_torch, settings, name, count))
        for name in names
    ]


def random_pixels(config: Any, count: int) -> Any:
    import numpy as np

    shape = (count, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def tower_case(settings: Settings, name: str, count: int) -> Case:
    @functools.cache
    def embed() -> tuple[Any, Any, Any]:
        import jax
        import programs

        config = programs.TOWERS[name]
        return config, random_pixels(config, count), jax.jit(programs.embed_pictures(config, dtype_of(settings)))

    def lower() -> Any:
        import programs

        config, pixels, function = embed()
        return function.lower(programs.tower_shapes(config), programs.shapes_of(pixels))

    def run(program: Any) -> Line:
        import jax
        import programs

        config, pixels, function = embed()
        shapes = programs.tower_shapes(config)
        found = programs.products(function, shapes, programs.shapes_of(pixels))
        params, pixels = jax.device_put((programs.random_params(shapes), pixels))
        line = measure(lambda: program(params, pixels), jax.block_until_ready, settings.seconds)
        floor = programs.flops(found) / machine(settings).product
        return {**rated(line, count, floor), "unit": "pictures", "flops": programs.flops(found)}

    return Case(f"towers/{name.replace('/', '-')}/ours", run, lower)


def embed_torch(settings: Settings, name: str, count: int) -> Line:
    """With how far ours are from theirs, of the same weights in the same precision."""
    import baselines
    import jax
    import numpy as np
    import programs
    import torch

    from clipcap_jax.convert import clip

    config = programs.TOWERS[name]
    pixels = random_pixels(config, count)
    torch.set_float32_matmul_precision("highest")
    theirs = baselines.Tower(config)
    heads = config.heads
    found, params = clip.from_arrays(theirs.arrays(), "the benchmark", heads)
    assert found == config
    ours = np.asarray(jax.jit(programs.embed_pictures(config, dtype_of(settings)))(params, pixels[:2]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = theirs.to(device, getattr(torch, dtype_of(settings)), memory_format=torch.channels_last)
    sent = torch.from_numpy(pixels).to(device)
    expected = theirs(sent[:2]).float().numpy(force=True)
    reset_peak()
    line = measure(lambda: theirs(sent), wait_for_torch, settings.seconds)
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    return {**rated(line, count), "unit": "pictures", "difference": difference, "peak": peak()}


def variants(settings: Settings) -> list[Case]:
    from variants import VARIANTS

    batch = 8 if settings.tiny else 256
    return [
        training_case(f"variants/{kind}/{name}", settings, kind, batch, change=change)
        for kind, changes in VARIANTS.items()
        for name, change in changes.items()
    ]


def lengths(settings: Settings) -> list[Case]:
    batch, padded = (8, (12,)) if settings.tiny else (256, (12, 16, 20, 48, 64))  # 14 is among the others
    return [training_case(f"lengths/mlp/{tokens}", settings, "mlp", batch, tokens) for tokens in padded]


if __name__ == "__main__":
    main()
