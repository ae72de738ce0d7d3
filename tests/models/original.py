"""Outputs of the original implementations (see tests/data/original/SOURCES.md), and their parameters under our"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipCapConfig
from clipcap_jax.models.gpt2 import Gpt2Config
from clipcap_jax.models.mapper import MapperConfig

DATA = Path(__file__).parents[1] / "data" / "original"

Arrays = Mapping[str, np.ndarray]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Original:
    """A small random captioner of the original: `arrays` and `sizes` hold what its files hold."""

    arrays: Arrays
    sizes: dict[str, Any]

    @classmethod
    def load(cls, kind: str) -> "Original":
        """`kind`: "mlp" or "transformer"."""
        with np.load(DATA / f"official_{kind}.npz") as arrays:
            return cls(dict(arrays), json.loads((DATA / f"official_{kind}.json").read_text()))

    @property
    def config(self) -> ClipCapConfig:
        sizes = self.sizes
        mapper = MapperConfig(
            kind=sizes["mapping_type"],
            prefix_length=sizes["prefix_length"],
            clip_length=sizes.get("clip_length", 0),
            layers=sizes.get("num_layers", 0),
            heads=sizes.get("num_heads", 0),
        )
        gpt2 = Gpt2Config(
            vocab_size=sizes["vocab_size"],
            positions=sizes["n_positions"],
            width=sizes["n_embd"],
            layers=sizes["n_layer"],
            heads=sizes["n_head"],
            dropout=0.1,
        )
        return ClipCapConfig(None, mapper, gpt2, normalize_embedding=False, dtype="float32", matmul_precision="highest")

    @property
    def params(self) -> Params:
        state = self._part("state/") | self._part("recovered/")
        return {
            "mapper": self._mapper(state),
            "gpt2": gpt2_params({name.removeprefix("gpt."): value for name, value in state.items()}),
        }

    @property
    def mapper_gradients(self) -> Params:
        return self._mapper(self._part("grad/"))

    def _part(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in self.arrays.items() if name.startswith(prefix)}

    def _mapper(self, state: Arrays) -> Params:
        state = {name.removeprefix("clip_project."): value for name, value in state.items()}
        if self.sizes["mapping_type"] == "mlp":
            return {"in": linear(state, "model.0"), "out": linear(state, "model.2")}
        return {
            "in": linear(state, "linear"),
            "constants": state["prefix_const"],
            "transformer": stacked(
                mapper_layer(state, f"transformer.layers.{i}") for i in range(self.sizes["num_layers"])
            ),
        }


def load_clip() -> tuple[ClipVitConfig, Params, Arrays]:
    """OpenAI's tower: sizes, parameters, and `pixel_values` and `image_embeds`."""
    sizes = json.loads((DATA / "openai_clip_vit.json").read_text())
    config = ClipVitConfig(
        image_size=sizes["image_resolution"],
        patch_size=sizes["vision_patch_size"],
        width=sizes["vision_width"],
        layers=sizes["vision_layers"],
        heads=sizes["heads"],
        embedding_width=sizes["embed_dim"],
    )
    arrays: dict[str, np.ndarray] = {}
    for path in DATA.glob("openai_clip_vit*.npz"):
        with np.load(path) as part:
            arrays.update(part)
    state = {name.removeprefix("state/visual."): value for name, value in arrays.items()}
    params = {
        "patches": {"kernel": state["conv1.weight"].transpose(2, 3, 1, 0)},
        "class_token": state["class_embedding"],
        "positions": state["positional_embedding"],
        "norm_before": norm(state, "ln_pre"),
        "transformer": stacked(clip_layer(state, f"transformer.resblocks.{i}") for i in range(config.layers)),
        "norm_after": norm(state, "ln_post"),
        "projection": {"kernel": state["proj"]},
    }
    return config, params, arrays


def gpt2_params(state: Arrays) -> Params:
    """The parameters of `GPT2LMHeadModel`, whose head is tied."""
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    return {
        "token_embeddings": state["transformer.wte.weight"],
        "position_embeddings": state["transformer.wpe.weight"],
        "transformer": stacked(gpt2_layer(state, f"transformer.h.{i}") for i in range(layers)),
        "final_norm": norm(state, "transformer.ln_f"),
    }


def gpt2_layer(state: Arrays, name: str) -> Params:
    # GPT-2 keeps its kernels as we do, inputs first.
    return {
        "norm_1": norm(state, f"{name}.ln_1"),
        "qkv": {"kernel": state[f"{name}.attn.c_attn.weight"], "bias": state[f"{name}.attn.c_attn.bias"]},
        "attention_out": {"kernel": state[f"{name}.attn.c_proj.weight"], "bias": state[f"{name}.attn.c_proj.bias"]},
        "norm_2": norm(state, f"{name}.ln_2"),
        "mlp_in": {"kernel": state[f"{name}.mlp.c_fc.weight"], "bias": state[f"{name}.mlp.c_fc.bias"]},
        "mlp_out": {"kernel": state[f"{name}.mlp.c_proj.weight"], "bias": state[f"{name}.mlp.c_proj.bias"]},
    }


def clip_layer(state: Arrays, name: str) -> Params:
    return {
        "norm_1": norm(state, f"{name}.ln_1"),
        "qkv": {"kernel": state[f"{name}.attn.in_proj_weight"].T, "bias": state[f"{name}.attn.in_proj_bias"]},
        "attention_out": linear(state, f"{name}.attn.out_proj"),
        "norm_2": norm(state, f"{name}.ln_2"),
        "mlp_in": linear(state, f"{name}.mlp.c_fc"),
        "mlp_out": linear(state, f"{name}.mlp.c_proj"),
    }


def mapper_layer(state: Arrays, name: str) -> Params:
    qkv = [state[f"{name}.attn.to_queries.weight"], state[f"{name}.attn.to_keys_values.weight"]]
    return {
        "norm_1": norm(state, f"{name}.norm1"),
        "qkv": {"kernel": np.concatenate(qkv).T},
        "attention_out": linear(state, f"{name}.attn.project"),
        "norm_2": norm(state, f"{name}.norm2"),
        "mlp_in": linear(state, f"{name}.mlp.fc1"),
        "mlp_out": linear(state, f"{name}.mlp.fc2"),
    }


def linear(state: Arrays, name: str) -> Params:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def norm(state: Arrays, name: str) -> Params:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def stacked(layers: Iterable[Params]) -> Params:
    return {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}
