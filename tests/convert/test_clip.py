import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from original import load_clip
from pytorch import arrays, clip_vision, import_torch, modified_resnet
from safetensors.numpy import save_file

from clipcap_jax.convert import clip
from clipcap_jax.errors import UserError
from clipcap_jax.models import clip_resnet, clip_vit
from clipcap_jax.models.clip_resnet import ClipResnetConfig
from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipConfig, tower

FLOAT32 = jnp.dtype("float32")
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY |= {"intermediate_size": 96, "projection_dim": 10}


def embed(config: ClipConfig, params: Any, pixels: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(tower(config, FLOAT32).apply)({"params": params}, pixels))


def random_pixels(size: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def torch_embed(model: Any, pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    return getattr(found, "image_embeds", found).numpy()


def openai_state(kind: str) -> dict[str, np.ndarray]:
    """OpenAI's names with a text tower, as a whole CLIP has it."""
    _, _, found = load_clip(kind)
    state = {name.removeprefix("state/"): value for name, value in found.items() if name.startswith("state/")}
    return state | {
        "transformer.resblocks.0.attn.in_proj_weight": np.zeros((6, 2), np.float32),
        "token_embedding.weight": np.zeros((5, 2), np.float32),
        "positional_embedding": np.zeros((3, 2), np.float32),
        "ln_final.weight": np.zeros(2, np.float32),
        "text_projection": np.zeros((2, 2), np.float32),
        "logit_scale": np.zeros((), np.float32),
    }


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_file_with_openais_names(kind: str, tmp_path: Path) -> None:
    state = {name: np.ascontiguousarray(value) for name, value in openai_state(kind).items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config, params = clip.load_clip(str(tmp_path))
    expected_config, expected, _ = load_clip(kind)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"image_size": 15, "patch_size": 5, "projection_dim": 7},
    ],
)
def test_equals_hugging_face(changes: dict[str, int], tmp_path: Path) -> None:
    import_torch()
    sizes = TINY | changes
    theirs = clip_vision(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    config, params = clip.load_clip(str(tmp_path))
    assert config == ClipVitConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        embedding_width=sizes["projection_dim"],
    )
    pixels = random_pixels(sizes["image_size"])
    np.testing.assert_allclose(embed(config, params, pixels), torch_embed(theirs, pixels), atol=1e-5)


@pytest.mark.slow
def test_equals_hugging_face_at_full_size() -> None:
    import_torch()
    theirs = clip_vision(scale=0.01, projection_dim=512)  # transformers' defaults are those of ViT-B/32
    config, params = clip.from_arrays(arrays(theirs), "a test")
    assert config == clip_vit.PRESETS["ViT-B/32"]
    pixels = random_pixels(224)
    expected = torch_embed(theirs, pixels)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(embed(config, params, pixels), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "width", "size"),
    [((1, 1, 1, 1), 8, 32), ((2, 1, 3, 1), 16, 64), pytest.param((4, 6, 10, 6), 80, 288, marks=pytest.mark.slow)],
)
def test_equals_open_clips_resnet(blocks: tuple[int, int, int, int], width: int, size: int) -> None:
    import_torch()
    heads = width * 32 // 64
    theirs = modified_resnet(layers=blocks, output_dim=640, heads=heads, image_size=size, width=width)
    config, params = clip.from_arrays(arrays(theirs), "a test")
    assert config == ClipResnetConfig(size, width, blocks, heads, embedding_width=640)
    if width == 80:
        assert config == clip_resnet.PRESETS["RN50x4"]
    pixels = random_pixels(size)
    expected = torch_embed(theirs, pixels)
    assert np.abs(embed(config, params, pixels) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", clip_resnet.PRESETS)
def test_resnet_presets_have_open_clips_shapes(name: str) -> None:
    """Every tensor of open_clip's model has a place in ours, and ours has no others."""
    torch = import_torch()
    config = clip_resnet.PRESETS[name]
    with torch.device("meta"):
        theirs = modified_resnet(
            layers=config.blocks,
            output_dim=config.embedding_width,
            heads=config.heads,
            image_size=config.image_size,
            width=config.width,
        )
    shapes = {key: np.broadcast_to(np.float32(1), value.shape) for key, value in theirs.state_dict().items()}
    found, params = clip.from_arrays(shapes, "a test")
    assert found == config
    norms = sum(value.size for key, value in shapes.items() if "bn" in key or "downsample.1" in key)
    counters = sum(key.endswith("num_batches_tracked") for key in shapes)
    biases = (norms - counters) // 4  # of the convolutions, which a norm's four vectors are folded into
    kernels = sum(value.size for value in shapes.values()) - norms
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == kernels + biases


def without(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in state.items() if key != name}


BLOCK = "visual.transformer.resblocks"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vit", lambda s: without(s, "visual.conv1.weight"), "conv1.weight, which shows the tower's size, is not ther"),
        ("vit", lambda s: s | {"visual.proj": s["visual.proj"][0]}, "proj, which shows the tower's size, is (24,)"),
        ("vit", lambda s: {k: v for k, v in s.items() if "ln_1" not in k}, "holds no layers of a transformer"),
        ("vit", lambda s: s | {"visual.positional_embedding": np.ones((1, 128))}, "whose sizes fit together"),
        ("resnet", lambda s: s | {"visual.conv1.bias": np.ones(4)}, "holds conv1.bias, which no CLIP has"),
        ("resnet", lambda s: s | {"visual.logit_scale": np.ones(1)}, "logit_scale is not known"),
        ("vit", lambda s: without(s, f"{BLOCK}.1.ln_2.bias"), "transformer.resblocks.1.ln_2.bias is not there"),
        ("vit", lambda s: s | {"visual.extra": np.ones(1)}, "extra is not known"),
        ("vit", lambda s: s | {"decoder.weight": np.ones(1)}, "holds tensors that no CLIP has: decoder.weight"),
        (
            "vit",
            lambda s: {"a": np.ones(1)},
            "holds no CLIP vision tower: neither OpenAI's parameter names nor Hugging",
        ),
        ("resnet", lambda s: without(s, "visual.layer1.0.bn2.bias"), "lacks layer1.0.bn2.bias"),
        (
            "resnet",
            lambda s: s | {"visual.bn1.running_var": -s["visual.bn1.running_var"]},
            "bn1.running_var holds values that are not finite or negative",
        ),
        (
            "resnet",
            lambda s: s | {"visual.bn1.bias": np.ones(3)},
            "bn1 does not have as many channels as conv1, 4",
        ),
        (
            "resnet",
            lambda s: s | {"visual.conv2.weight": s["visual.conv2.weight"] * np.inf},
            "conv2.weight holds values that are not finite",
        ),
    ],
)
def test_what_is_wrong_is_said(kind: str, change: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        clip.from_arrays(change(openai_state(kind)), "model.safetensors")
    assert message in str(raised.value)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"hidden_act": "gelu"}, "activation gelu"), ({"layer_norm_eps": 1e-6}, "layer-norm epsilon 1e-06")],
)
def test_other_towers_of_hugging_face_are_refused(stored: dict[str, Any], message: str) -> None:
    state = {"vision_model.embeddings.class_embedding": np.ones(4)}
    with pytest.raises(UserError, match=message):
        clip.from_arrays(state, "model.safetensors", stored={"vision_config": stored})


def test_open_clips_config(tmp_path: Path) -> None:
    state = {name: np.ascontiguousarray(value) for name, value in openai_state("vit").items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"width": 128, "layers": 2}

    def load(**model: Any) -> ClipConfig:
        stored = {"model_cfg": {"vision_cfg": vision, **model}, "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(stored))
        return clip.load_clip(str(tmp_path), heads=8)[0]

    assert load(quick_gelu=True).heads == 2  # 64 wide, whatever was asked for
    assert load(quick_gelu=True, vision_cfg={**vision, "head_width": 32}).heads == 4
    with pytest.raises(UserError, match="is a tower with the activation GELU; OpenAI's CLIP has quick_gelu"):
        load()
    (tmp_path / "open_clip_config.json").unlink()
    assert clip.load_clip(str(tmp_path), heads=8)[0].heads == 8
    with pytest.raises(UserError, match="whose sizes fit together"):
        clip.load_clip(str(tmp_path), heads=7)


def test_timms_own_names_beside_openais(tmp_path: Path) -> None:
    state = {name: np.ascontiguousarray(value) for name, value in openai_state("vit").items()}
    save_file({"blocks.0.attn.qkv.weight": np.ones((3, 1), np.float32)}, tmp_path / "model.safetensors")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    assert clip.load_clip(str(tmp_path))[0] == load_clip("vit")[0]


def test_sizes_that_no_memory_holds() -> None:
    """A small file whose shapes show a picture of 60,000 pixels a side is refused at once."""
    state = openai_state("vit")
    state["visual.conv1.weight"] = np.zeros((1, 3, 60_000, 1), np.float32)
    with pytest.raises(UserError, match=r"tensors are wrong|whose sizes fit together"):
        clip.from_arrays(state, "model.safetensors")
