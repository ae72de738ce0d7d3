"""`clipcap doctor`."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcap_jax import files
from clipcap_jax.metrics import SpiceConfig, unavailable
from clipcap_jax.progress import screen

# What an extra brings, any of these modules, and what it is for.
_EXTRAS = {
    "java": ("pycocoevalcap", "METEOR and SPICE"),
    "torch": ("torch", "the original's checkpoints"),
    "tensorflow": ("tensorflow", "TFDS's coco_captions as tfrecord"),
    "beam": ("apache_beam", "preparing on many machines"),
    "gcs": ("gcsfs", "data sets and runs on gs://"),
    "demo": ("gradio", "the page of clipcap demo"),
    "wandb": ("wandb", "training's numbers at Weights & Biases"),
    "gpu": ("jax_cuda12_plugin jax_cuda13_plugin", "NVIDIA GPUs"),
    "tpu": ("libtpu", "TPUs"),
}


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    doctor = commands.add_parser("doctor", help="what this machine has, and what is missing")
    doctor.set_defaults(run=_doctor)


def _doctor(_: argparse.Namespace) -> None:
    console = screen()
    for what, finding in _findings():
        console.print(f"{what}: {finding}", soft_wrap=True)


def _findings() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    for requirement in importlib.metadata.requires("clipcap_jax") or []:
        if "extra ==" not in requirement:
            package = re.split(r"[^\w.-]", requirement)[0]
            yield package, _version(package)
    yield "Devices", _devices()
    for name, folder in _caches():
        yield name, f"{folder}, {_size(folder)}"
    yield "Java", shutil.which("java") or "missing: no `java` on the PATH"
    for name, reason in {"METEOR": "", "SPICE": "", **unavailable(meteor=True, spice=SpiceConfig())}.items():
        yield name, reason or "can be computed"
    for extra, (modules, purpose) in _EXTRAS.items():
        there = any(importlib.util.find_spec(module) for module in modules.split())
        yield f"Extra {extra}, for {purpose}", "there" if there else f'missing: pip install "clipcap_jax[{extra}]"'


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: pip install {package}"


def _devices() -> str:
    try:
        from clipcap_jax import parallel

        return parallel.describe_devices()
    except Exception as error:  # of JAX or a driver, whose trouble is what is asked for
        return f"none: {error}"


def _caches() -> Iterator[tuple[str, Path]]:
    from huggingface_hub import constants

    yield "Cache of clipcap_jax", files.home()
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield "Cache of compiled programs", Path(compiled)
    yield "Cache of the Hugging Face hub", Path(constants.HF_HUB_CACHE)


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not there yet"
    size = sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)
    return f"{size / 2**20:,.0f} MiB"
