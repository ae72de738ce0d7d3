"""CLIP's text towers, from the files and with the care that `clip.py` has for the vision towers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipcap_jax.convert.clip import (
    HEAD_WIDTH,
    IGNORED,
    OPENAI_LAYERS,
    check_hugging_face,
    check_open_clip,
    count_layers,
    hugging_face_layers,
    read_size,
)
from clipcap_jax.convert.mapping import Arrays, Source, Table, load, norm, same
from clipcap_jax.errors import UserError
from clipcap_jax.models.clip_text import ClipText, ClipTextConfig

OPENAI: Table = {
    **same("token_embeddings", "token_embedding.weight"),
    **same("positions", "positional_embedding"),
    **OPENAI_LAYERS,
    **norm("final_norm", "ln_final"),
    **same("projection/kernel", "text_projection"),
}
HUGGING_FACE: Table = {
    **same("token_embeddings", "text_model.embeddings.token_embedding.weight"),
    **same("positions", "text_model.embeddings.position_embedding.weight"),
    **hugging_face_layers("text_model"),
    **norm("final_norm", "text_model.final_layer_norm"),
    "projection/kernel": Source(("text_projection.weight",), "linear"),
}
_VISION = "of the vision tower"
_IGNORED = {r"visual\..*|vision_model\..*|visual_projection\.weight": _VISION, **IGNORED}


def from_arrays(arrays: Arrays, source: str, stored: Mapping[str, Any] | None = None) -> tuple[ClipTextConfig, Any]:
    """A pretrained text tower.

    Args:
      arrays: a CLIP's tensors under OpenAI's or Hugging Face's names, such as `clip.read` gives them.
      source: their file's name, for messages.
      stored: what `config.json` or `open_clip_config.json` says.

    Returns:
      The tower's sizes and its parameters.

    Raises:
      UserError: they are not a CLIP text tower's, or one of another architecture.
    """
    stored = stored or {}
    if HUGGING_FACE["token_embeddings"].names[0] in arrays:
        return _load(HUGGING_FACE, arrays, source, _hugging_face_heads(arrays, source, stored))
    if OPENAI["token_embeddings"].names[0] in arrays:
        return _load(OPENAI, arrays, source, _open_clip_heads(stored, source))
    raise UserError(
        f"{source} holds no CLIP text tower, neither under OpenAI's parameter names nor Hugging Face's: "
        "name the weights of a whole CLIP"
    )


def _hugging_face_heads(arrays: Arrays, source: str, stored: Mapping[str, Any]) -> int | None:
    stored = stored.get("text_config", stored)
    check_hugging_face(stored, source)
    # OpenAI's checkpoints on the hub say 2, for which transformers, too, takes the greatest id.
    end = read_size(arrays, HUGGING_FACE["token_embeddings"].names[0], 2, source)[0] - 1
    if (found := stored.get("eos_token_id", end)) not in (2, end):
        raise UserError(f"{source} is a tower with the end token {found}; OpenAI's CLIP has the greatest id, {end}")
    return stored.get("num_attention_heads", 8) if stored else None  # as transformers' CLIPTextConfig


def _open_clip_heads(stored: Mapping[str, Any], source: str) -> int | None:
    model = check_open_clip(stored, source)
    text = model.get("text_cfg", {})
    if text.get("pool_type", "argmax") != "argmax" or text.get("no_causal_mask"):
        raise UserError(f"{source} is a text tower that does not look back from the end token, as OpenAI's CLIP does")
    return text.get("heads", 8) if model else None  # open_clip's default


def _load(table: Table, arrays: Arrays, source: str, heads: int | None) -> tuple[ClipTextConfig, Any]:
    def size(parameter: str) -> tuple[int, ...]:
        return read_size(arrays, table[parameter].names[0], 2, source)

    vocab_size, width = size("token_embeddings")
    config = ClipTextConfig(
        vocab_size=vocab_size,
        context_length=size("positions")[0],
        width=width,
        layers=count_layers(arrays, table, source),
        heads=heads or max(1, width // HEAD_WIDTH),
        embedding_width=size("projection/kernel")[1 if table["projection/kernel"].layout == "same" else 0],
    )
    if min(config.context_length, config.width, config.heads) < 1 or config.width % config.heads:
        raise UserError(f"{source} holds no CLIP text tower whose sizes fit together: its shapes show {config}")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(ClipText(config, jnp.dtype("float32")).init, jax.random.key(0), tokens)["params"]
    return config, load(table, shapes, arrays, _IGNORED, source)
