"""CLIP's vision towers from OpenAI's and open_clip's files, and from Hugging Face's.

Text towers, which `clip_text.py` reads, are passed over. Sizes come from the shapes. No shape shows the number of heads
and the activation: Hugging Face's or open_clip's config beside the weights says them; a file alone is taken for
OpenAI's, all of whose towers have heads 64 wide and `quick_gelu`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import hub
from clipcap_jax.convert import weights
from clipcap_jax.convert.mapping import Arrays, Source, Table, conv, linear, load, norm, same, some
from clipcap_jax.errors import UserError
from clipcap_jax.models.clip_resnet import ClipResnetConfig
from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipConfig, tower

HEAD_WIDTH = 64

# timm's repositories hold the tower under timm's own names as well, as model.safetensors.
FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)

# Of neither tower.
IGNORED = {
    r"logit_scale": "a factor of the training's loss",
    r"input_resolution|context_length|vocab_size": "a size that the shapes show too",
    r"(vision|text)_model\.embeddings\.position_ids": "0, 1, 2, ...",
}
_TEXT = "of the text tower"
_OPENAI_IGNORED = {
    r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection": _TEXT,
    **IGNORED,
}
_COUNTERS = {r".*\.num_batches_tracked": "a counter of the batch norm's training"}
_HUGGING_FACE_IGNORED = {r"text_model\..*|text_projection\.weight": _TEXT, **IGNORED}

OPENAI_LAYERS: Table = {
    **norm("transformer/layers/norm_1", "transformer.resblocks.{layer}.ln_1"),
    "transformer/layers/qkv/kernel": Source(("transformer.resblocks.{layer}.attn.in_proj_weight",), "linear"),
    "transformer/layers/qkv/bias": Source(("transformer.resblocks.{layer}.attn.in_proj_bias",)),
    **linear("transformer/layers/attention_out", "transformer.resblocks.{layer}.attn.out_proj"),
    **norm("transformer/layers/norm_2", "transformer.resblocks.{layer}.ln_2"),
    **linear("transformer/layers/mlp_in", "transformer.resblocks.{layer}.mlp.c_fc"),
    **linear("transformer/layers/mlp_out", "transformer.resblocks.{layer}.mlp.c_proj"),
}


def hugging_face_layers(model: str) -> Table:
    """The transformer of "vision_model" or "text_model"."""
    layer = f"{model}.encoder.layers.{{layer}}"
    qkv = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    return {
        **norm("transformer/layers/norm_1", f"{layer}.layer_norm1"),
        "transformer/layers/qkv/kernel": Source(tuple(f"{name}.weight" for name in qkv), "linear", (1, 1, 1)),
        "transformer/layers/qkv/bias": Source(tuple(f"{name}.bias" for name in qkv), shares=(1, 1, 1)),
        **linear("transformer/layers/attention_out", f"{layer}.self_attn.out_proj"),
        **norm("transformer/layers/norm_2", f"{layer}.layer_norm2"),
        **linear("transformer/layers/mlp_in", f"{layer}.mlp.fc1"),
        **linear("transformer/layers/mlp_out", f"{layer}.mlp.fc2"),
    }


_OPENAI_VIT: Table = {
    "patches/kernel": Source(("conv1.weight",), "conv"),
    **same("class_token", "class_embedding"),
    **same("positions", "positional_embedding"),
    **norm("norm_before", "ln_pre"),
    **OPENAI_LAYERS,
    **norm("norm_after", "ln_post"),
    **same("projection/kernel", "proj"),
}

_HUGGING_FACE_VIT: Table = {
    "patches/kernel": Source(("vision_model.embeddings.patch_embedding.weight",), "conv"),
    **same("class_token", "vision_model.embeddings.class_embedding"),
    **same("positions", "vision_model.embeddings.position_embedding.weight"),
    **norm("norm_before", "vision_model.pre_layrnorm"),
    **hugging_face_layers("vision_model"),
    **norm("norm_after", "vision_model.post_layernorm"),
    "projection/kernel": Source(("visual_projection.weight",), "linear"),
}


def load_clip(source: str, heads: int | None = None) -> tuple[ClipConfig, Any]:
    """A pretrained vision tower.

    Args:
      source: a file, a folder, or a name on the Hugging Face hub, whose tensors have OpenAI's names
        (`timm/vit_base_patch32_clip_224.openai`, OpenAI's `.pt` files) or Hugging Face's
        (`openai/clip-vit-base-patch32`).
      heads: of the attention, where no config beside the weights says it; None: the width over 64.

    Returns:
      The tower's sizes and its parameters.

    Raises:
      UserError: there are no such weights, or they are not a CLIP vision tower's.
    """
    arrays, path, stored = read(source)
    return from_arrays(arrays, str(path), heads, stored)


def read(source: str) -> tuple[Arrays, Path, dict[str, Any]]:
    """The tensors of a CLIP, their file, and what Hugging Face's or open_clip's config beside it says."""
    path = hub.locate(source, FILES)
    arrays = weights.read(path)
    hugging_face = any(name.startswith(("vision_model.", "text_model.")) for name in arrays)
    return arrays, path, weights.read_config(path.with_name("config.json" if hugging_face else "open_clip_config.json"))


def from_arrays(
    arrays: Arrays, source: str, heads: int | None = None, stored: Mapping[str, Any] | None = None
) -> tuple[ClipConfig, Any]:
    """As `load_clip`, from tensors; `stored` is what `config.json` or `open_clip_config.json` says."""
    stored = stored or {}
    if any(name.startswith("vision_model.") for name in arrays):
        return _hugging_face(arrays, source, heads, stored)
    if any(name.startswith("visual.") for name in arrays):
        other = [name for name in arrays if not name.startswith("visual.")]
        unknown = [name for name in other if not any(re.fullmatch(pattern, name) for pattern in _OPENAI_IGNORED)]
        if unknown:
            raise UserError(f"{source} holds tensors that no CLIP has: {some(sorted(unknown))}")
        arrays = {name.removeprefix("visual."): array for name, array in arrays.items() if name.startswith("visual.")}
    heads = _open_clip_heads(check_open_clip(stored, source)) or heads
    if "attnpool.positional_embedding" in arrays:
        return _resnet(arrays, source, heads)
    if "class_embedding" in arrays:
        vit = _vit_config(arrays, source, _OPENAI_VIT, heads)
        return vit, _load(vit, _OPENAI_VIT, arrays, {}, source)
    raise UserError(f"{source} holds no CLIP vision tower: neither OpenAI's parameter names nor Hugging Face's")


def check_open_clip(stored: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The sizes that `open_clip_config.json` says, if it says any, of a CLIP whose activation is OpenAI's."""
    model = stored.get("model_cfg", {})
    # open_clip takes GELU itself where its config is silent.
    if model and not model.get("quick_gelu", False):
        raise UserError(f"{source} is a tower with the activation GELU; OpenAI's CLIP has quick_gelu")
    return model


def _open_clip_heads(model: Mapping[str, Any]) -> int | None:
    """The number of heads that it says, if it says one."""
    vision = model.get("vision_cfg", {})
    head_width = vision.get("head_width", HEAD_WIDTH)  # open_clip's default
    width = vision.get("width", 0) * (1 if isinstance(vision.get("layers"), int) else 32)
    return width // head_width or None


def _load(config: ClipConfig, table: Table, arrays: Arrays, ignored: Mapping[str, str], source: str) -> Any:
    if min(config.image_size, config.width, config.heads) < 1 or _width(config) % config.heads:
        raise UserError(f"{source} holds no CLIP vision tower whose sizes fit together: its shapes show {config}")
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(tower(config, jnp.dtype("float32")).init, jax.random.key(0), pixels)["params"]
    return load(table, shapes, arrays, ignored, source)


def _width(config: ClipConfig) -> int:
    """What the attention's heads share."""
    return 32 * config.width if isinstance(config, ClipResnetConfig) else config.width


def read_size(arrays: Arrays, name: str, rank: int, source: str) -> tuple[int, ...]:
    """The shape that sizes are read from, before all shapes are checked."""
    shape = arrays[name].shape if name in arrays else ()
    if len(shape) != rank:
        raise UserError(f"{source}: {name}, which shows the tower's size, is " + (f"{shape}" if shape else "not there"))
    return shape


def count_layers(arrays: Arrays, table: Table, source: str) -> int:
    """The layers of the transformer in a table, by their names."""
    names = re.escape(table["transformer/layers/norm_1/scale"].names[0]).replace(r"\{layer\}", r"(\d+)")
    layers = {match[1] for name in arrays if (match := re.fullmatch(names, name))}
    if not layers:
        raise UserError(f"{source} holds no layers of a transformer")
    return len(layers)


def _vit_config(arrays: Arrays, source: str, table: Table, heads: int | None) -> ClipVitConfig:
    def size(parameter: str, rank: int) -> tuple[int, ...]:
        return read_size(arrays, table[parameter].names[0], rank, source)

    width, _, patch, _ = size("patches/kernel", 4)
    projection = size("projection/kernel", 2)
    return ClipVitConfig(
        image_size=patch * round((size("positions", 2)[0] - 1) ** 0.5),
        patch_size=patch,
        width=width,
        layers=count_layers(arrays, table, source),
        heads=heads or max(1, width // HEAD_WIDTH),
        embedding_width=projection[1 if table["projection/kernel"].layout == "same" else 0],
    )


def _hugging_face(
    arrays: Arrays, source: str, heads: int | None, stored: Mapping[str, Any]
) -> tuple[ClipVitConfig, Any]:
    stored = stored.get("vision_config", stored)
    check_hugging_face(stored, source)
    if stored:
        heads = stored.get("num_attention_heads", 12)  # where the file is silent, as transformers' CLIPVisionConfig
    config = _vit_config(arrays, source, _HUGGING_FACE_VIT, heads)
    return config, _load(config, _HUGGING_FACE_VIT, arrays, _HUGGING_FACE_IGNORED, source)


def check_hugging_face(stored: Mapping[str, Any], source: str) -> None:
    """Raise a UserError unless a tower's part of `config.json` is of OpenAI's architecture."""
    # What it leaves out is as in transformers' CLIPVisionConfig and CLIPTextConfig.
    if (activation := stored.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise UserError(f"{source} is a tower with the activation {activation}; OpenAI's CLIP has quick_gelu")
    if (epsilon := stored.get("layer_norm_eps", 1e-5)) != 1e-5:
        raise UserError(f"{source} is a tower with the layer-norm epsilon {epsilon}; OpenAI's CLIP has 1e-5")


def _resnet(arrays: Arrays, source: str, heads: int | None) -> tuple[ClipResnetConfig, Any]:
    width = read_size(arrays, "conv3.weight", 4, source)[0]
    positions, channels = read_size(arrays, "attnpool.positional_embedding", 2, source)
    names = [re.fullmatch(r"layer([1-4])\.(\d+)\.conv1\.weight", name) for name in arrays]
    stages = [match[1] for match in names if match]
    config = ClipResnetConfig(
        image_size=32 * round((positions - 1) ** 0.5),
        width=width,
        blocks=(stages.count("1"), stages.count("2"), stages.count("3"), stages.count("4")),
        heads=heads or channels // HEAD_WIDTH,
        embedding_width=read_size(arrays, "attnpool.c_proj.weight", 2, source)[0],
    )
    return config, _load(config, _resnet_table(config), _fold_norms(arrays, source), _COUNTERS, source)


def _resnet_table(config: ClipResnetConfig) -> Table:
    table = {
        **same("pool/positions", "attnpool.positional_embedding"),
        **linear("pool/query", "attnpool.q_proj"),
        **linear("pool/key", "attnpool.k_proj"),
        **linear("pool/value", "attnpool.v_proj"),
        **linear("pool/projection", "attnpool.c_proj"),
    }
    for i in (1, 2, 3):
        table |= conv(f"stem_{i}", f"conv{i}")
    for stage, blocks in enumerate(config.blocks, start=1):
        for block in range(blocks):
            ours, theirs = f"stage_{stage}_block_{block + 1}", f"layer{stage}.{block}"
            for i in (1, 2, 3):
                table |= conv(f"{ours}/conv_{i}", f"{theirs}.conv{i}")
            table |= conv(f"{ours}/shortcut", f"{theirs}.downsample.0")
    return table


def _fold_norms(arrays: Arrays, source: str) -> Arrays:
    """Every batch norm folded, in float64, into the convolution before it: bn1 into conv1, downsample.1 into .0."""
    folded = dict(arrays)
    for name in arrays:
        if not name.endswith(".running_mean"):
            continue
        norm_name = name.removesuffix(".running_mean")
        conv_name = re.sub(r"bn(\d)$", r"conv\1", norm_name) if "bn" in norm_name else norm_name[:-1] + "0"
        parts = [f"{norm_name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        missing = [part for part in [*parts, f"{conv_name}.weight"] if part not in arrays]
        if missing:
            raise UserError(f"{source} lacks {', '.join(missing)}")
        if f"{conv_name}.bias" in arrays:
            raise UserError(f"{source} holds {conv_name}.bias, which no CLIP has")
        scale, bias, mean, variance = (np.asarray(folded.pop(part), np.float64) for part in parts)
        kernel = np.asarray(arrays[f"{conv_name}.weight"], np.float64)
        if {part.shape for part in (scale, bias, mean, variance)} != {kernel.shape[:1]}:
            raise UserError(f"{source}: {norm_name} does not have as many channels as {conv_name}, {kernel.shape[0]}")
        if not (variance >= 0).all():
            raise UserError(f"{source}: {norm_name}.running_var holds values that are not finite or negative")
        scale = scale / np.sqrt(variance + 1e-5)  # torch's default epsilon
        folded[f"{conv_name}.weight"] = kernel * scale[:, None, None, None]
        folded[f"{conv_name}.bias"] = bias - mean * scale
    return folded
