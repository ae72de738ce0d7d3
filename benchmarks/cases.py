"""The cases of `device.py`. What PyTorch's need is imported where it is used, as it may be missing."""

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
from original import Original
from variants import OPTIONS, VARIANTS, Change

from clipcap_jax import parallel
from clipcap_jax.captioning.decode import beam_search
from clipcap_jax.config import DecodeConfig
from clipcap_jax.convert import clip
from clipcap_jax.convert.original import to_arrays
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.training.loss import caption_loss

ROOT = Path(__file__).parents[1]
KINDS: tuple[programs.Kind, ...] = ("mlp", "transformer")
BATCHES = (256, 40, 1024)
PICTURES = (32, 128, 1, 512)
BEAMS, LENGTH = 5, 20
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
    """`run` makes its line; `lower`, if any, the program that has to be compiled before, with XLA's `options`, which
    `run` then gets."""

    name: str
    run: Callable[..., Line]
    lower: Callable[[], Any] | None = None
    options: dict[str, Any] | None = None


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


def cases(settings: Settings) -> list[Case]:
    """All of them, the most important first."""
    small, *others = (8,) if settings.tiny else BATCHES
    return [
        Case("device", functools.partial(describe, settings)),
        *training(settings),
        *captioning(settings),
        *parity(settings),
        *compiled_training(settings, [small]),
        *towers(settings),
        *variants(settings),
        *lengths(settings),
        *compiled_training(settings, others),
    ]


def dtype_of(settings: Settings) -> Any:
    return settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def describe(settings: Settings) -> Line:
    device = jax.devices()[0]
    rates = machine(settings)
    return {
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "memory": output_of("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader"),
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
    width = 512 if settings.tiny else 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype_of(settings)))
    matmul = jax.jit(functools.partial(jnp.matmul, precision="highest"))  # as float32 is computed here
    product = measure(functools.partial(matmul, matrix, matrix), jax.block_until_ready, settings.seconds)
    numbers = jnp.ones((16 * width, width), jnp.float32)  # 4 GB on a GPU
    # Negated, as a copy alone may be left out.
    moved = measure(functools.partial(jax.jit(jnp.negative), numbers), jax.block_until_ready, settings.seconds)
    return programs.Machine(2 * width**3 / product["seconds"], 2 * numbers.nbytes / moved["seconds"])


def parity(settings: Settings) -> list[Case]:
    dtypes: tuple[programs.Dtype, ...] = ("float32", "bfloat16")
    made = [parity_case(kind, dtype) for dtype in dtypes for kind in KINDS]
    made.append(repeat_case("parity/repeated", settings, None))
    made.append(repeat_case("parity/repeated/deterministic", settings, {"xla_gpu_deterministic_ops": True}))
    return made


def parity_case(kind: str, dtype: programs.Dtype) -> Case:
    """Differences as a share of the largest value, and how many captions are the same, token by token."""

    def lower() -> Any:
        original = Original.load(kind)
        model = ClipCap(dataclasses.replace(original.config, dtype=dtype))
        decode = DecodeConfig(original.sizes["beam_size"], original.sizes["entry_length"], length_penalty=1.0, stop="")

        def loss(params: Any, inputs: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, inputs, tokens)
            total, count = caption_loss(logits, tokens, jnp.full(len(tokens), tokens.shape[1]), targets="original")
            return total / count, logits

        def outputs(params: Any, inputs: jax.Array, tokens: jax.Array) -> Any:
            found = beam_search(model, params, inputs, decode, original.sizes["stop_token"])
            return jax.value_and_grad(loss, has_aux=True)(params, inputs, tokens), found

        return jax.jit(outputs).lower(original.params, original.arrays["clip_embedding"], original.arrays["tokens"])

    def run(program: Any) -> Line:
        original = Original.load(kind)
        arrays, sizes = original.arrays, original.sizes
        ((loss, logits), gradients), found = jax.device_get(
            program(original.params, arrays["clip_embedding"], arrays["tokens"])
        )

        def difference(actual: Any, expected: Any) -> float:
            return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())

        real = arrays["token_mask"] > 0
        ours = to_arrays(original.config, gradients)
        differences = {
            "logits": difference(logits[real], arrays["logits"][:, sizes["prefix_length"] - 1 : -1][real]),
            "loss": difference(loss, arrays["loss"]),
            "gradients": max(difference(ours[name], theirs) for name, theirs in original.part("grad/").items()),
        }
        same = [
            [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected["beams"]
            for tokens, lengths, expected in zip(found.tokens, found.lengths, sizes["generation"], strict=True)
        ]
        line = {**differences, "beams": f"{sum(same)} of {len(same)}"}
        if dtype == "bfloat16":
            return line
        return {**line, "tolerance": 1e-5, "passed": all(value <= 1e-5 for value in differences.values()) and all(same)}

    return Case(f"parity/{kind}/{dtype}", run, lower)


def repeat_case(name: str, settings: Settings, options: dict[str, Any] | None) -> Case:
    """Whether three steps from the same state give the same bits, twice."""
    case = training_case(name, settings, "mlp", 8 if settings.tiny else 40)

    def run(program: Any) -> Line:
        model = captioner(settings, "mlp")
        batch = programs.random_batch(model, 8 if settings.tiny else 40, programs.TOKENS)

        def steps() -> list[Any]:
            state, frozen, sent = place(model, random_params(model), batch)
            losses = []
            for _ in range(3):
                state, metrics = program(state, frozen, sent)
                losses.append(float(metrics["loss"]))
            return [losses, jax.device_get(jax.tree.leaves(state.params))]

        (first, one), (second, other) = steps(), steps()
        differing = max(float(np.mean(a != b)) for a, b in zip(one, other, strict=True))
        return {"losses_equal": first == second, "parameters_differing": differing, "loss": first[-1]}

    return Case(name, run, case.lower, options)


def captioner(settings: Settings, kind: Any) -> Any:
    return programs.captioner(kind, "tiny" if settings.tiny else "gpt2", dtype=dtype_of(settings))


@functools.lru_cache(maxsize=4)
def random_params(model: Any) -> Any:
    return programs.random_params(programs.param_shapes(model))


def place(model: Any, params: Any, batch: Any) -> tuple[Any, Any, Any]:
    """The arguments of a step, on the device."""
    return *parallel.replicate(programs.training_state(model, params)), parallel.send(batch)


def training(settings: Settings) -> list[Case]:
    batches = (8,) if settings.tiny else BATCHES
    ours = [
        training_case(f"training/{kind}/{batch}/ours", settings, kind, batch) for kind in KINDS for batch in batches
    ]
    return ours + [
        Case(f"training/{kind}/{batch}/original", functools.partial(train_torch, settings, kind, batch, False))
        for batch in batches
        for kind in KINDS
    ]


def compiled_training(settings: Settings, batches: Sequence[int]) -> list[Case]:
    return [
        Case(f"training/{kind}/{batch}/compiled", functools.partial(train_torch, settings, kind, batch, True))
        for batch in batches
        for kind in KINDS
    ]


def training_case(
    name: str,
    settings: Settings,
    kind: Any,
    batch_size: int,
    tokens: int | None = None,
    change: Change = contextlib.nullcontext,
    options: dict[str, Any] | None = None,
) -> Case:
    """Steps of training, traced while `change()` is entered."""

    @functools.cache
    def mapped() -> tuple[Any, Any, Any]:
        model = captioner(settings, kind)
        batch = programs.random_batch(model, batch_size, tokens or programs.TOKENS)
        return model, batch, parallel.map_step(programs.training_step(model))

    def lower() -> Any:
        model, batch, step = mapped()
        with change():
            return step.lower(*programs.training_state(model, programs.param_shapes(model)), programs.shapes_of(batch))

    def run(program: Any) -> Line:
        model, batch, _ = mapped()
        found = programs.products(
            programs.training_step(model),
            *programs.training_state(model, programs.param_shapes(model)),
            programs.shapes_of(batch),
        )
        state, frozen, sent = place(model, random_params(model), batch)
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

    return Case(name, run, lower, options)


@functools.lru_cache(maxsize=3)
def torch_captioner(settings: Settings, kind: Any, use: str) -> Any:
    """One for each use, as training changes the weights."""
    import baselines
    import torch

    model = captioner(settings, kind)
    arrays = to_arrays(model.config, random_params(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return baselines.Captioner(model.config, arrays, programs.EMBEDDING).to(device)


def train_torch(settings: Settings, kind: Any, batch_size: int, compiled: bool) -> Line:
    import baselines

    allow_tf32(True)  # PyTorch's default when the original was written
    theirs = torch_captioner(settings, kind, "training")
    batch = programs.random_batch(captioner(settings, kind), batch_size, programs.TOKENS)
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


def allow_tf32(allowed: bool) -> None:
    import torch

    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed  # which the line above leaves as it is


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
    return [
        *(captioning_case(f"captioning/{count}/ours", settings, count) for count in counts),
        compare_case(settings, counts[0] if settings.tiny else 8),
        Case("captioning/1/original", functools.partial(search_torch, settings, 1, "original")),
        *(
            Case(f"captioning/{count}/generate", functools.partial(search_torch, settings, count, "generate"))
            for count in counts
        ),
    ]


def search(settings: Settings, count: int, dtype: Any) -> tuple[Any, Any, Any]:
    """A model, embeddings to caption, and the search."""
    model = programs.captioner("mlp", "tiny" if settings.tiny else "gpt2", dtype=dtype)
    return model, programs.random_embeddings(count), jax.jit(programs.best_captions(model, BEAMS, LENGTH))


def compare_case(settings: Settings, count: int) -> Case:
    """How many captions are the original's, token by token, both in float32 at the highest precision."""

    def lower() -> Any:
        model, embeddings, best = search(settings, count, "float32")
        return best.lower(programs.param_shapes(model), programs.shapes_of(embeddings))

    def run(program: Any) -> Line:
        import torch

        allow_tf32(False)
        model, embeddings, _ = search(settings, count, "float32")
        ours = np.asarray(program(random_params(model), embeddings).tokens)
        theirs = torch_captioner(settings, "mlp", "captioning").eval()
        rows = torch.from_numpy(embeddings).to(next(theirs.parameters()).device)
        expected = np.stack([theirs.search(row[None], BEAMS, LENGTH).numpy(force=True) for row in rows])
        return {"same": int((ours == expected).all(axis=1).sum()), "of": count}

    return Case("captioning/same", run, lower)


def captioning_case(
    name: str,
    settings: Settings,
    count: int,
    change: Change = contextlib.nullcontext,
    options: dict[str, Any] | None = None,
) -> Case:
    def lower() -> Any:
        model, embeddings, best = search(settings, count, dtype_of(settings))
        with change():
            return best.lower(programs.param_shapes(model), programs.shapes_of(embeddings))

    def run(program: Any) -> Line:
        model, embeddings, best = search(settings, count, dtype_of(settings))
        found = programs.products(best, programs.param_shapes(model), programs.shapes_of(embeddings))
        floor = programs.captioning_floor(machine(settings), model, found, count, BEAMS, LENGTH)
        params, embeddings = jax.device_put((random_params(model), embeddings))
        line = measure(lambda: program(params, embeddings).tokens, jax.block_until_ready, settings.seconds)
        return {**rated(line, count, floor), "unit": "captions"}

    return Case(name, run, lower, options)


def search_torch(settings: Settings, count: int, way: str) -> Line:
    import torch

    allow_tf32(True)
    theirs = torch_captioner(settings, "mlp", "captioning").eval()
    if way == "generate":
        theirs = copy.deepcopy(theirs).to(getattr(torch, dtype_of(settings)))
    parameter = next(theirs.parameters())
    rows = torch.from_numpy(programs.random_embeddings(count)).to(parameter.device, parameter.dtype)
    reset_peak()
    way_of = theirs.search if way == "original" else theirs.generate
    with torch.inference_mode():
        line = measure(lambda: way_of(rows, BEAMS, LENGTH), wait_for_torch, settings.seconds)
    return {**rated(line, count), "unit": "captions", "peak": peak()}


def towers(settings: Settings) -> list[Case]:
    names = ("tiny ViT", "tiny ResNet") if settings.tiny else ("ViT-B/32", "RN50x4")
    ways = {"ours": embed_pictures, "torch": embed_torch}
    return [
        tower_case(f"towers/{name.replace('/', '-')}/{way}", settings, name, embed)
        for way, embed in ways.items()
        for name in names
    ]


def tower_case(
    name: str,
    settings: Settings,
    tower: str,
    embed: Callable[..., Line],
    change: Change = contextlib.nullcontext,
    options: dict[str, Any] | None = None,
) -> Case:
    config, count = programs.TOWERS[tower], 2 if settings.tiny else 256

    def pixels() -> np.ndarray:
        shape = (count, config.image_size, config.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def lower() -> Any:
        function = jax.jit(programs.embed_pictures(config, dtype_of(settings)))
        with change():
            return function.lower(programs.tower_shapes(config), programs.shapes_of(pixels()))

    def run(program: Any) -> Line:
        return {**embed(settings, config, pixels(), program), "unit": "pictures"}

    return Case(name, run, lower, options)


def embed_pictures(settings: Settings, config: Any, pixels: np.ndarray, program: Any) -> Line:
    shapes = programs.tower_shapes(config)
    found = programs.products(programs.embed_pictures(config, dtype_of(settings)), shapes, programs.shapes_of(pixels))
    params, sent = jax.device_put((programs.random_params(shapes), pixels))
    line = measure(lambda: program(params, sent), jax.block_until_ready, settings.seconds)
    line = rated(line, len(pixels), programs.flops(found) / machine(settings).product)
    return {**line, "flops": programs.flops(found)}


def embed_torch(settings: Settings, config: Any, pixels: np.ndarray, program: Any) -> Line:
    """With how far ours are from theirs, of the same weights in the same precision."""
    import baselines
    import torch

    allow_tf32(False)
    theirs = baselines.Tower(config)
    found, params = clip.from_arrays(theirs.arrays(), "the benchmark", config.heads)
    assert found == config
    ours = np.asarray(program(params, pixels))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = theirs.to(device, getattr(torch, dtype_of(settings)), memory_format=torch.channels_last)
    sent = torch.from_numpy(pixels).to(device)
    expected = theirs(sent).float().numpy(force=True)
    reset_peak()
    line = rated(measure(lambda: theirs(sent), wait_for_torch, settings.seconds), len(pixels))
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    return {**line, "difference": difference, "peak": peak()}


def variants(settings: Settings) -> list[Case]:
    batch, pictures, tower = (8, 2, "tiny ViT") if settings.tiny else (256, 128, "ViT-B/32")

    def case(kind: str, name: str, change: Change) -> Case:
        title, options = f"variants/{kind}/{name}", OPTIONS.get(name)
        if kind == "search":
            return captioning_case(title, settings, pictures, change, options)
        if kind == "tower":
            return tower_case(title, settings, tower, embed_pictures, change, options)
        return training_case(title, settings, kind, batch, change=change, options=options)

    return [case(kind, name, change) for kind, changes in VARIANTS.items() for name, change in changes.items()]


def lengths(settings: Settings) -> list[Case]:
    batch, padded = (8, (12,)) if settings.tiny else (256, (12, 16, 20, 48, 64))  # 14 is among the others
    return [training_case(f"lengths/mlp/{tokens}", settings, "mlp", batch, tokens) for tokens in padded]
