"""GPT-2 from Hugging Face's files, of any size and language, and back to a folder that transformers reads."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipcap_jax import files, hub
from clipcap_jax.convert import weights
from clipcap_jax.convert.mapping import Arrays, Source, Table, load, norm, same, some, store
from clipcap_jax.errors import UserError
from clipcap_jax.models.gpt2 import Gpt2, Gpt2Config
from clipcap_jax.text.tokenizer import Tokenizer

_HEAD_WIDTH = 64  # in every GPT-2 that OpenAI published

# OpenAI's weights and tokenizer of 124M parameters, at a commit of the hub.
OPENAI = "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e"

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

IGNORED = {
    r"h\.\d+\.attn\.(bias|masked_bias)": "the causal mask and its value, which older releases of transformers stored",
}


def _conv1d(ours: str, theirs: str) -> dict[str, Source]:
    """What transformers calls Conv1D: a linear layer, kept as (in, out) like ours."""
    return {f"{ours}/kernel": Source((f"{theirs}.weight",)), f"{ours}/bias": Source((f"{theirs}.bias",))}


TABLE: Table = {
    **same("token_embeddings", "wte.weight"),
    **same("position_embeddings", "wpe.weight"),
    **norm("transformer/layers/norm_1", "h.{layer}.ln_1"),
    **_conv1d("transformer/layers/qkv", "h.{layer}.attn.c_attn"),
    **_conv1d("transformer/layers/attention_out", "h.{layer}.attn.c_proj"),
    **norm("transformer/layers/norm_2", "h.{layer}.ln_2"),
    **_conv1d("transformer/layers/mlp_in", "h.{layer}.mlp.c_fc"),
    **_conv1d("transformer/layers/mlp_out", "h.{layer}.mlp.c_proj"),
    **norm("final_norm", "ln_f"),
}

# What `config.json` says otherwise of models that ours does not compute: what transformers' GPT2Config takes where the
# file is silent, and what is allowed.
_REQUIRED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
}


def load_gpt2(source: str, heads: int | None = None) -> tuple[Gpt2Config, Any]:
    """A pretrained GPT-2.

    Args:
      source: a file, a folder, or a name on the Hugging Face hub ("gpt2", "gpt2-xl", "dbmdz/german-gpt2").
      heads: of the attention, where no `config.json` beside the weights says it; None: the width over 64.

    Returns:
      The sizes, with transformers' default dropout of 0.1, and the parameters.

    Raises:
      UserError: there are no such weights, or they are not a GPT-2's.
    """
    path = hub.locate(source, FILES)
    stored = weights.read_config(path.with_name("config.json"))
    for name, (default, allowed) in _REQUIRED.items():
        if (value := stored.get(name, default)) not in allowed:
            raise UserError(f"{path} is not a GPT-2 like OpenAI's: its config.json says {name}={value!r:.80}")
    if stored:
        heads = stored.get("n_head", 12)
    return from_arrays(weights.read(path), str(path), heads)


def from_arrays(arrays: Arrays, source: str, heads: int | None = None) -> tuple[Gpt2Config, Any]:
    """As `load_gpt2`, from tensors under the names of `GPT2LMHeadModel` or `GPT2Model`."""
    if twice := [name for name in arrays if f"transformer.{name}" in arrays]:
        raise UserError(f"{source} holds tensors with and without the prefix transformer.: {some(twice)}")
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    head = arrays.pop("lm_head.weight", None)
    for name in ("wte.weight", "wpe.weight"):
        if name not in arrays or arrays[name].ndim != 2:
            raise UserError(f"{source} holds no GPT-2: {name}, which shows its size, is not there or no matrix")
    if head is not None and not np.array_equal(head, arrays["wte.weight"]):
        raise UserError(f"{source} has an output layer of its own; GPT-2's is its token embedding")
    vocab_size, width = arrays["wte.weight"].shape
    config = Gpt2Config(
        vocab_size=vocab_size,
        positions=len(arrays["wpe.weight"]),
        width=width,
        layers=len({match[1] for name in arrays if (match := re.fullmatch(r"h\.(\d+)\.ln_1\.weight", name))}),
        heads=heads or max(1, width // _HEAD_WIDTH),
        dropout=0.1,
        word_dropout=0.0,
    )
    if not config.layers:
        raise UserError(f"{source} holds no layers of a GPT-2, which are named h.0.ln_1.weight and so on")
    if width % config.heads:
        raise UserError(f"{source}: {config.heads} heads do not divide the width, {width}: give the number of heads")
    shapes = jax.eval_shape(Gpt2(config, jnp.dtype("float32")).init, jax.random.key(0), jnp.zeros((1, 1, width)))
    return config, load(TABLE, shapes["params"], arrays, IGNORED, source)


def save_gpt2(config: Gpt2Config, params: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, sizes and tokenizer, as transformers' `from_pretrained` reads them.

    Args:
      config, params: the language model.
      tokenizer: its tokenizer.
      folder: to be made.

    Raises:
      UserError: the folder is there already, or cannot be written.
    """
    from safetensors.numpy import save_file

    if folder.exists():
        raise UserError(f"{folder} is there already: name another folder")
    sizes = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.positions,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": tokenizer.end_id,
        "eos_token_id": tokenizer.end_id,
        "tie_word_embeddings": True,
    }
    with files.whole(folder) as partial:
        partial.mkdir(parents=True)
        # Without its prefix, as on the hub; the tied output layer is not stored twice.
        save_file(store(TABLE, params), partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")
        stored = tokenizer.to_dict()
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": stored["end_token"]}
        (partial / "tokenizer.json").write_text(stored["tokenizer_json"], encoding="utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
