"""The original's checkpoints, and back: what its `train.py` saves of `ClipCaptionModel` and `ClipCaptionPrefix`."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import files
from clipcap_jax.convert import gpt2, weights
from clipcap_jax.convert.mapping import Arrays, Source, Table, linear, load, norm, same, some, store
from clipcap_jax.errors import UserError
from clipcap_jax.models.clipcap import ClipCapConfig
from clipcap_jax.models.mapper import MAPPERS, MapperConfig

_MAPPER, _GPT2 = "clip_project.", "gpt."
HEADS = 8  # of the original's transformer mapper, in its `TransformerMapper`

_MLP: Table = {**linear("in", "model.0"), **linear("out", "model.2")}

_LAYER = "transformer.layers.{layer}"
_TRANSFORMER: Table = {
    **linear("in", "linear"),
    **same("constants", "prefix_const"),
    **norm("transformer/layers/norm_1", f"{_LAYER}.norm1"),
    "transformer/layers/qkv/kernel": Source(
        (f"{_LAYER}.attn.to_queries.weight", f"{_LAYER}.attn.to_keys_values.weight"), "linear", (1, 2)
    ),
    **linear("transformer/layers/attention_out", f"{_LAYER}.attn.project"),
    **norm("transformer/layers/norm_2", f"{_LAYER}.norm2"),
    **linear("transformer/layers/mlp_in", f"{_LAYER}.mlp.fc1"),
    **linear("transformer/layers/mlp_out", f"{_LAYER}.mlp.fc2"),
}


TABLES = {"mlp": _MLP, "transformer": _TRANSFORMER}


def load_original(
    path: Path, *, normalize_embedding: bool, mapper_heads: int = HEADS, gpt2_heads: int | None = None
) -> tuple[ClipCapConfig, int, Any]:
    """A checkpoint of the original.

    Args:
      path: the `.pt` file.
      normalize_embedding: whether it was trained with `--normalize_prefix`.
      mapper_heads: of the transformer mapper; the original has 8.
      gpt2_heads: None: the width over 64.

    Returns:
      The model's sizes (without a tower), the width of the embeddings that it reads, and its parameters.

    Raises:
      UserError: it is not such a file, or holds anything but tensors.
    """
    stored = weights.read(path)
    # What a trainer that holds the model calls it comes before all names.
    prefix = min((name.partition(_MAPPER)[0] for name in stored if _MAPPER in name), default="")
    arrays = _part(stored, prefix)
    unknown = sorted(name for name in stored if not name.startswith((prefix + _MAPPER, prefix + _GPT2)))
    if unknown or not any(name.startswith(_MAPPER) for name in arrays):
        raise UserError(
            f"{path} is not a checkpoint of the original ClipCap, whose tensors are named clip_project.* and gpt.*"
            + (f": it holds {some(unknown)}" if unknown else "")
        )
    language_model, gpt2_params = gpt2.from_arrays(_part(arrays, _GPT2), str(path), gpt2_heads)
    projection = _part(arrays, _MAPPER)
    mapper, embedding_width, mapper_params = mapper_from_arrays(
        projection, language_model.width, mapper_heads, str(path)
    )
    model = ClipCapConfig(
        clip=None,
        mapper=mapper,
        gpt2=language_model,
        normalize_embedding=normalize_embedding,
        dtype="float32",
        matmul_precision="default",
    )
    return model, embedding_width, {"mapper": mapper_params, "gpt2": gpt2_params}


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def mapper_from_arrays(arrays: Arrays, width: int, heads: int, source: str) -> tuple[MapperConfig, int, Any]:
    """The mapper from tensors under the original's names.

    Args:
      arrays: of `clip_project`.
      width: D.
      heads: of a transformer mapper.
      source: the file's name, for messages.

    Returns:
      Its sizes, the embeddings' width E, and its parameters.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays or arrays[name].ndim != 2:
            raise UserError(f"{source}: clip_project.{name}, which shows the mapper's size, is not there or no matrix")
        return arrays[name].shape

    if "model.0.weight" in arrays:
        prefix_length = shape("model.2.weight")[0] // width
        embedding_width = shape("model.0.weight")[1]
        # What a transformer alone has is 1, as nothing may be 0.
        config = MapperConfig("mlp", prefix_length=prefix_length, clip_length=1, layers=1, heads=1, dropout=0.0)
    else:
        tokens, embedding_width = shape("linear.weight")
        config = MapperConfig(
            "transformer",
            prefix_length=shape("prefix_const")[0],
            clip_length=tokens // width,
            layers=len({match[1] for name in arrays if (match := re.match(r"transformer\.layers\.(\d+)", name))}),
            heads=heads,
            dropout=0.0,
        )
        if width % heads:
            raise UserError(f"{source}: {heads} heads do not divide the mapper's width, {width}: give --mapper-heads")
    if min(config.prefix_length, config.clip_length, config.layers, embedding_width) < 1:
        raise UserError(f"{source} holds no mapper whose sizes fit together: its shapes show {config}")
    module = MAPPERS[config.kind](config, width, jnp.dtype("float32"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, embedding_width)))["params"]
    return config, embedding_width, load(TABLES[config.kind], shapes, arrays, {}, source)


def to_arrays(config: ClipCapConfig, params: Any) -> Arrays:
    """Parameters, or their gradients, under the original's names; GPT-2's output layer, which is tied, is left out."""
    mapper, language_model = store(TABLES[config.mapper.kind], params["mapper"]), store(gpt2.TABLE, params["gpt2"])
    return {f"clip_project.{name}": array for name, array in mapper.items()} | {
        f"gpt.transformer.{name}": array for name, array in language_model.items()
    }


def save_original(config: ClipCapConfig, params: Any, path: Path) -> None:
    """Write a checkpoint in the layout of the original's own.

    The transformers 4.10 that it pins keeps GPT-2's causal masks among the weights, so they are written too; newer ones
    do not, and take the file with `strict=False`.

    Raises:
      UserError: torch is not installed, the file cannot be written, or the original has no such mapper.
    """
    if config.mapper.kind == "transformer" and config.mapper.heads != HEADS:
        raise UserError(
            f"the mapper has {config.mapper.heads} heads; the original's has {HEADS}, and would compute something else"
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path} is a file of PyTorch: pip install "clipcap_jax[torch]" to write it') from error

    arrays = to_arrays(config, params)
    for layer in range(config.gpt2.layers):
        mask = np.tril(np.ones((config.gpt2.positions, config.gpt2.positions), np.uint8))[None, None]
        arrays[f"gpt.transformer.h.{layer}.attn.bias"] = mask
        arrays[f"gpt.transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]  # tied: stored once
    with files.whole(path) as partial:
        torch.save(state, partial)
