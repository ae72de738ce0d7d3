"""A whole small CLIP as files: OpenAI's vision tower of `original.load_clip`, a random text tower, a tokenizer."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from original import load_clip
from random_models import random_params
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

from clipcap_jax import hub
from clipcap_jax.convert import clip_text, mapping
from clipcap_jax.models.clip_text import ClipText, ClipTextConfig

MERGES = [("p", "h"), ("o", "g</w>"), ("d", "og</w>"), ("ph", "o"), ("t", "s</w>")]
VOCAB_SIZE = 2 * 256 + len(MERGES) + 2
CONFIG = ClipTextConfig(VOCAB_SIZE, context_length=77, width=32, layers=2, heads=2, embedding_width=24)


def write_tokenizer(folder: Path) -> Path:
    """`vocab.json` and `merges.txt` of a tokenizer that knows few words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES)]
    ids = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return folder


def text_params(config: ClipTextConfig = CONFIG, seed: int = 0) -> Any:
    """Random ones."""
    return random_params(ClipText(config, jnp.dtype("float32")), seed, np.zeros((1, 4), np.int32))


def openai_state(kind: str = "vit", config: ClipTextConfig = CONFIG) -> dict[str, np.ndarray]:
    """Both towers under OpenAI's names; `kind` as in `load_clip`."""
    _, _, found = load_clip(kind)
    state = {name.removeprefix("state/"): value for name, value in found.items() if name.startswith("state/")}
    state |= mapping.store(clip_text.OPENAI, text_params(config)) | {"logit_scale": np.ones((), np.float32)}
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def write_clip(folder: Path) -> Path:
    """Weights and tokenizer."""
    write_tokenizer(folder)
    save_file(openai_state(), folder / "open_clip_model.safetensors")
    # Heads of 16: without it they are taken to be 64 wide.
    sizes = {"quick_gelu": True, "vision_cfg": {"width": 128, "layers": 2}, "text_cfg": {"heads": CONFIG.heads}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    return folder


def in_hub_cache(cache: Path, repository: str) -> Path:
    """The folder of the only snapshot of a repository in a copy of the hub's cache, to write its files to."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    for name in hub.CONFIG_FILES:
        (snapshot / name).write_text("{}")
    return snapshot
