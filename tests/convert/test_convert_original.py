import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from original import Original
from pytorch import gpt2, import_torch, save

from clipcap_jax.convert import weights
from clipcap_jax.convert.original import load_original, save_original
from clipcap_jax.errors import UserError
from clipcap_jax.models.clipcap import ClipCapConfig


@pytest.fixture(params=["mlp", "transformer"])
def original(request: pytest.FixtureRequest) -> Original:
    return Original.load(request.param)


def load(path: Path, original: Original) -> tuple[ClipCapConfig, int, Any]:
    heads = original.sizes.get("num_heads", 8)
    return load_original(path, normalize_embedding=False, mapper_heads=heads, gpt2_heads=original.sizes["n_head"])


def test_sizes_are_read_from_the_shapes(original: Original, tmp_path: Path) -> None:
    sizes = original.sizes
    config, embedding_width, params = load(save(original.state, tmp_path / "coco_prefix-009.pt"), original)
    assert embedding_width == sizes["prefix_size"]
    assert (config.clip, config.dtype, config.normalize_embedding) == (None, "float32", False)
    mapper, language_model = config.mapper, config.gpt2
    assert (mapper.kind, mapper.prefix_length) == (sizes["mapping_type"], sizes["prefix_length"])
    if mapper.kind == "transformer":
        assert mapper.clip_length == sizes["clip_length"]
        assert (mapper.layers, mapper.heads) == (sizes["num_layers"], sizes["num_heads"])
    assert (language_model.vocab_size, language_model.positions) == (sizes["vocab_size"], sizes["n_positions"])
    assert (language_model.width, language_model.layers) == (sizes["n_embd"], sizes["n_layer"])
    assert language_model.heads == sizes["n_head"]
    jax.tree.map(np.testing.assert_array_equal, params, original.params)


def test_buffers_and_the_prefix_of_data_parallel_training(original: Original, tmp_path: Path) -> None:
    state = original.state
    for i in range(original.sizes["n_layer"]):
        state[f"gpt.transformer.h.{i}.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
        state[f"gpt.transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    _, _, params = load(save(state, tmp_path / "model.pt", prefix="module."), original)
    jax.tree.map(np.testing.assert_array_equal, params, original.params)


@pytest.mark.parametrize("prefix", ["captioner.", "model.net.", "module.lightning.model._orig_mod."])
def test_what_a_trainer_calls_the_model(prefix: str, original: Original, tmp_path: Path) -> None:
    _, _, params = load(save(original.state, tmp_path / "model.pt", prefix=prefix), original)
    jax.tree.map(np.testing.assert_array_equal, params, original.params)


MASKS = (".attn.bias", ".attn.masked_bias")


def test_in_out_and_in_again(original: Original, tmp_path: Path) -> None:
    config, width, params = load(save(original.state, tmp_path / "theirs.pt"), original)
    save_original(config, params, tmp_path / "ours.pt")
    assert [path.name for path in tmp_path.glob("ours*")] == ["ours.pt"]
    theirs, ours = weights.read(tmp_path / "theirs.pt"), weights.read(tmp_path / "ours.pt")
    assert {name for name in ours if not name.endswith(MASKS)} == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].dtype == array.dtype
    again = load(tmp_path / "ours.pt", original)
    assert again[:2] == (config, width)
    jax.tree.map(np.testing.assert_array_equal, again[2], params)


def test_gpt2s_masks_are_those_of_transformers_4(original: Original, tmp_path: Path) -> None:
    """Its `GPT2Attention.__init__` registers them, and `load_state_dict` asks for them."""
    import_torch()
    save_original(original.config, original.params, tmp_path / "ours.pt")
    state = weights.read(tmp_path / "ours.pt")
    positions = original.sizes["n_positions"]
    for layer in range(original.sizes["n_layer"]):
        mask = state[f"gpt.transformer.h.{layer}.attn.bias"]
        assert mask.dtype == np.uint8
        assert mask.shape == (1, 1, positions, positions)
        np.testing.assert_array_equal(mask[0, 0], np.arange(positions)[:, None] >= np.arange(positions))
        assert state[f"gpt.transformer.h.{layer}.attn.masked_bias"] == -1e4


def test_transformers_of_today_takes_what_comes_out(original: Original, tmp_path: Path) -> None:
    import_torch()
    sizes = original.sizes
    theirs = gpt2(**{name: sizes[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")})
    save_original(original.config, original.params, tmp_path / "ours.pt")
    import torch

    state = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert state["gpt.lm_head.weight"].data_ptr() == state["gpt.transformer.wte.weight"].data_ptr()  # stored once
    part = {name.removeprefix("gpt."): value for name, value in state.items() if name.startswith("gpt.")}
    report = theirs.load_state_dict(part, strict=False)
    assert not report.missing_keys
    assert all(name.endswith(MASKS) for name in report.unexpected_keys)


def test_a_mapper_that_the_original_does_not_have(tmp_path: Path) -> None:
    original = Original.load("transformer")
    mapper = dataclasses.replace(original.config.mapper, heads=4)
    with pytest.raises(UserError, match="the mapper has 4 heads; the original's has 8"):
        save_original(dataclasses.replace(original.config, mapper=mapper), original.params, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(original: Original, tmp_path: Path) -> None:
    import_torch()
    with pytest.raises(UserError, match="cannot be written"):
        save_original(original.config, original.params, tmp_path / "gone" / "model.pt")


NORM = "gpt.transformer.h.0.ln_1.weight"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mlp", lambda s: {"model": s["clip_project.model.0.bias"]}, "is not a checkpoint of the original ClipCap"),
        ("mlp", lambda s: s | {"clip.weight": np.ones(1)}, r"whose tensors are named .*: it holds clip\.weight"),
        (
            "mlp",
            lambda s: {f"net.{k}": v for k, v in s.items()} | {"loss.weight": np.ones(1)},
            r"it holds loss\.weight$",
        ),
        ("mlp", lambda s: s | {f"ema.{k}": v for k, v in s.items()}, r"it holds ema\.clip_project\..*, \.\.\.$"),
        ("mlp", lambda s: {k: v for k, v in s.items() if k.startswith("gpt.")}, "is not a checkpoint of the original"),
        ("mlp", lambda s: s | {NORM: s[NORM][1:]}, r"h\.0\.ln_1\.weight has the shape \(31,\), where \(32,\) is neede"),
        ("mlp", lambda s: s | {NORM: s[NORM] * np.nan}, r"h\.0\.ln_1\.weight holds values that are not finite"),
        (
            "mlp",
            lambda s: {k.replace("model.2.bias", "model.2.b"): v for k, v in s.items()},
            r"(?s)model\.2\.bias is not there.*model\.2\.b is not known",
        ),
        (
            "mlp",
            lambda s: s | {"clip_project.model.0.weight": s["clip_project.model.0.weight"].T},
            r"model\.0\.weight has the shape \(16, \d+\), where",
        ),
        (
            "mlp",
            lambda s: s | {f"module.{NORM}": s[NORM]},
            r"with and without the prefix module\. or _orig_mod\.: gpt\.transformer\.h\.0\.ln_1\.weight",
        ),
        (
            "mlp",
            lambda s: s | {"clip_project.model.2.weight": np.ones((8, 96), np.float32)},
            "holds no mapper whose sizes fit together",
        ),
        (
            "transformer",
            lambda s: {k: v for k, v in s.items() if k != "clip_project.linear.weight"},
            r"clip_project\.linear\.weight, which shows the mapper's size, is not there",
        ),
        (
            "transformer",
            lambda s: {k: v for k, v in s.items() if "lm_head" in k or "wte" not in k},
            r"holds no GPT-2: wte\.weight",
        ),
    ],
)
def test_what_is_wrong_is_said(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    original = Original.load(kind)
    path = save(change(original.state), tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        load(path, original)


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    path = save(Original.load("transformer").state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="5 heads do not divide the mapper's width, 32: give --mapper-heads"):
        load_original(path, normalize_embedding=False, mapper_heads=5)
