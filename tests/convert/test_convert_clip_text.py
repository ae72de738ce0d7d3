import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_files import CONFIG, openai_state, text_params
from original import load_clip
from pytorch import arrays, import_torch, text_transformer, whole_clip
from pytorch import clip_text as hugging_face_text
from safetensors.numpy import save_file

from clipcap_jax.convert import clip, clip_text, mapping
from clipcap_jax.errors import UserError
from clipcap_jax.models.clip_text import ClipText, ClipTextConfig

FLOAT32 = jnp.dtype("float32")
TINY = {"vocab_size": 99, "max_position_embeddings": 20, "hidden_size": 24, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 3, "intermediate_size": 96, "projection_dim": 10, "eos_token_id": 98}
VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
VISION |= {"intermediate_size": 48}


def embed(config: ClipTextConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(ClipText(config, FLOAT32).apply)({"params": params}, tokens))


def random_tokens(config: ClipTextConfig, texts: int = 5) -> np.ndarray:
    """The start token, something, and the end token at various places, the first text filling the whole context."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size - 2, (texts, config.context_length), dtype=np.int32)
    tokens[:, 0] = config.vocab_size - 2
    tokens[np.arange(texts), [-1, *random.integers(1, config.context_length, texts - 1)]] = config.vocab_size - 1
    return tokens


def torch_embed(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long())
    return getattr(found, "text_embeds", found).numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eos_token_id": 2},  # OpenAI's checkpoints on the hub
        {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"vocab_size": 50, "max_position_embeddings": 7, "projection_dim": 5, "eos_token_id": 49},
    ],
)
def test_equals_hugging_face(changes: dict[str, int], tmp_path: Path) -> None:
    import_torch()
    sizes = TINY | changes
    theirs = hugging_face_text(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    found, path, stored = clip.read(str(tmp_path))
    config, params = clip_text.from_arrays(found, str(path), stored)
    assert config == ClipTextConfig(
        vocab_size=sizes["vocab_size"],
        context_length=sizes["max_position_embeddings"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        embedding_width=sizes["projection_dim"],
    )
    tokens = random_tokens(config)
    assert_close(embed(config, params, tokens), torch_embed(theirs, tokens))


@pytest.mark.slow
def test_equals_hugging_face_at_full_size() -> None:
    import_torch()
    theirs = hugging_face_text(scale=0.01)  # transformers' defaults are those of ViT-B/32
    config, params = clip_text.from_arrays(arrays(theirs), "a test")
    assert config == ClipTextConfig(49408, 77, width=512, layers=12, heads=8, embedding_width=512)
    tokens = random_tokens(config)
    expected = torch_embed(theirs, tokens)
    assert np.abs(expected).max() > 1
    assert_close(embed(config, params, tokens), expected)


@pytest.mark.parametrize("sizes", [{"width": 24, "heads": 3, "layers": 2}, {"width": 128, "heads": 2, "layers": 1}])
def test_equals_open_clip(sizes: dict[str, int]) -> None:
    import_torch()
    theirs = text_transformer(vocab_size=60, context_length=11, output_dim=7, **sizes)
    stored = {"model_cfg": {"quick_gelu": True, "text_cfg": {"heads": sizes["heads"]}}}
    # Without a config, heads are 64 wide.
    config, params = clip_text.from_arrays(arrays(theirs), "a test", stored if sizes["width"] == 24 else None)
    assert config == ClipTextConfig(60, 11, embedding_width=7, **sizes)
    tokens = random_tokens(config)
    assert_close(embed(config, params, tokens), torch_embed(theirs, tokens))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_both_towers_of_one_file_with_openais_names(kind: str, tmp_path: Path) -> None:
    vision, vision_params, _ = load_clip(kind)
    expected = dataclasses.replace(CONFIG, embedding_width=vision.embedding_width)
    save_file(openai_state(kind, expected), tmp_path / "open_clip_model.safetensors")
    found, path, stored = clip.read(str(tmp_path))
    config, params = clip_text.from_arrays(found, str(path), stored)
    assert config == dataclasses.replace(expected, heads=1)  # no config says otherwise
    jax.tree.map(np.testing.assert_array_equal, params, text_params(expected))
    again, params = clip.from_arrays(found, str(path), stored=stored)
    assert again == vision
    jax.tree.map(np.testing.assert_array_equal, params, vision_params)


def test_both_towers_of_one_file_with_hugging_faces_names(tmp_path: Path) -> None:
    import_torch()
    theirs = whole_clip(VISION, TINY, width=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    found, path, stored = clip.read(str(tmp_path))
    config, params = clip_text.from_arrays(found, str(path), stored)
    assert config == ClipTextConfig(99, 20, width=24, layers=2, heads=3, embedding_width=10)
    vision, _ = clip.from_arrays(found, str(path), stored=stored)
    assert (vision.embedding_width, vision.heads) == (10, 3)
    back = mapping.store(clip_text.HUGGING_FACE, params)
    assert back.keys() == {name for name in found if name.startswith("text_")}
    for name, array in back.items():
        np.testing.assert_array_equal(array, found[name])


def hugging_face_state() -> dict[str, np.ndarray]:
    return mapping.store(clip_text.HUGGING_FACE, text_params())


def without(state: dict[str, np.ndarray], *parts: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "token_embedding"), "holds no CLIP text tower, neither under OpenAI's parameter names"),
        (lambda s: {n: v for n, v in s.items() if n.startswith("visual.")}, "name the weights of a whole CLIP"),
        (lambda s: without(s, "text_projection"), "text_projection, which shows the tower's size, is not there"),
        (
            lambda s: s | {"positional_embedding": np.ones(4)},
            "positional_embedding, which shows the tower's size, is",
        ),
        (lambda s: s | {"positional_embedding": np.ones((0, 32))}, "whose sizes fit together"),
        (lambda s: {n: v for n, v in s.items() if "ln_1" not in n}, "holds no layers of a transformer"),
        (lambda s: without(s, "ln_final.bias"), "ln_final.bias is not there"),
        (lambda s: without(s, "resblocks.1.mlp.c_fc.bias"), "transformer.resblocks.1.mlp.c_fc.bias is not there"),
        (
            lambda s: s | {"text.decoder": np.ones(1), "a": np.ones(1)},
            "2 tensors are wrong:\n  a is not known\n  tex",
        ),
        (lambda s: s | {"text_projection": s["text_projection"] * np.inf}, "holds values that are not finite"),
        (lambda s: s | {"ln_final.weight": np.ones(5)}, "ln_final.weight has the shape (5,), where (32,) is needed"),
    ],
)
def test_what_is_wrong_is_said(change: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        clip_text.from_arrays(change(openai_state()), "model.safetensors")
    assert message in str(raised.value)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"hidden_act": "gelu"}, "is a tower with the activation gelu; OpenAI's CLIP has quick_gelu"),
        ({"layer_norm_eps": 1e-6}, "layer-norm epsilon 1e-06"),
        ({"eos_token_id": 3}, f"the end token 3; OpenAI's CLIP has the greatest id, {CONFIG.vocab_size - 1}"),
        ({"num_attention_heads": 5}, "whose sizes fit together"),
    ],
)
def test_other_towers_of_hugging_face_are_refused(stored: dict[str, Any], message: str) -> None:
    """Whether the config is of a whole CLIP or of the tower alone."""
    for config in (stored, {"text_config": stored, "vision_config": {}}):
        with pytest.raises(UserError) as raised:
            clip_text.from_arrays(hugging_face_state(), "model.safetensors", config)
        assert message in str(raised.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"text_cfg": {"heads": 2}}, "is a tower with the activation GELU; OpenAI's CLIP has quick_gelu"),
        ({"quick_gelu": True, "text_cfg": {"pool_type": "last"}}, "does not look back from the end token"),
        ({"quick_gelu": True, "text_cfg": {"no_causal_mask": True}}, "does not look back from the end token"),
    ],
)
def test_other_towers_of_open_clip_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clip_text.from_arrays(openai_state(), "model.safetensors", {"model_cfg": model})


def test_open_clips_config(tmp_path: Path) -> None:
    save_file(openai_state(), tmp_path / "open_clip_model.safetensors")
    for text, heads in (({"heads": 2}, 2), ({}, 8)):
        model = {"quick_gelu": True, "vision_cfg": {"width": 128, "layers": 2}, "text_cfg": text}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        found, path, stored = clip.read(str(tmp_path))
        assert clip_text.from_arrays(found, str(path), stored)[0].heads == heads
