"""The same numbers as the original ClipCap and as OpenAI's CLIP, from the same parameters."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from original import DATA, Original, Params, load_clip

from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.config import DecodeConfig
from clipcap_jax.convert.original import to_arrays
from clipcap_jax.models.clip_resnet import ClipResnetConfig
from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipCap, tower
from clipcap_jax.training.loss import caption_loss

TOLERANCE = 1e-5  # of the largest value


def assert_close(actual: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module", params=["mlp", "transformer"])
def original(request: pytest.FixtureRequest) -> Original:
    return Original.load(request.param)


@pytest.fixture(scope="module")
def logits(original: Original) -> np.ndarray:
    model, arrays = ClipCap(original.config), original.arrays
    return jax.jit(model.apply)({"params": original.params}, arrays["clip_embedding"], arrays["tokens"])


def test_every_parameter_is_used(original: Original) -> None:
    model, arrays = ClipCap(original.config), original.arrays
    ours = jax.eval_shape(model.init, jax.random.key(0), arrays["clip_embedding"], arrays["tokens"])["params"]
    assert jax.tree.map(jnp.shape, original.params) == jax.tree.map(jnp.shape, ours)
    np.testing.assert_array_equal(arrays["state/gpt.lm_head.weight"], arrays["state/gpt.transformer.wte.weight"])


def test_prefix(original: Original) -> None:
    prefix = ClipCap(original.config).apply(
        {"params": original.params}, original.arrays["clip_embedding"], method="prefix"
    )
    assert_close(prefix, original.arrays["prefix_embeds"])


def test_logits(original: Original, logits: np.ndarray) -> None:
    real = original.arrays["token_mask"] > 0
    expected = original.arrays["logits"][:, original.sizes["prefix_length"] - 1 : -1]
    assert_close(logits[real], expected[real])


def test_loss_and_gradients(original: Original) -> None:
    arrays = original.arrays

    def loss(params: Params) -> jax.Array:
        logits = ClipCap(original.config).apply({"params": params}, arrays["clip_embedding"], arrays["tokens"])
        every_position = jnp.full(len(logits), arrays["tokens"].shape[1])
        total, count = caption_loss(logits, jnp.asarray(arrays["tokens"]), every_position, targets="original")
        return total / count

    loss_value, gradients = jax.jit(jax.value_and_grad(loss))(original.params)
    assert_close(loss_value, arrays["loss"])
    found, expected = to_arrays(original.config, gradients), original.part("grad/")
    assert {name for name in found if name.startswith("clip_project.")} <= expected.keys()
    # Where GPT-2 is frozen, it has none.
    assert any(name.startswith("gpt.") for name in expected) == (original.sizes["mapping_type"] == "mlp")
    for name in expected:
        assert_close(found[name], expected[name])


def test_all_targets_differ_by_the_real_token_0_alone(original: Original, logits: np.ndarray) -> None:
    tokens, mask = original.arrays["tokens"], original.arrays["token_mask"]
    loss, count = caption_loss(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(mask.sum(axis=1).astype(int)))
    forgotten = np.argwhere((tokens == 0) & (mask > 0))
    assert forgotten.tolist() == [[0, 3]]
    log_probs = np.asarray(logits, np.float64)[0, 3]
    log_probs -= np.log(np.exp(log_probs).sum())
    assert count == mask.sum()
    assert_close((loss + log_probs[0]) / (count - 1), original.arrays["loss"])


def search(original: Original, beam_size: int) -> Hypotheses:
    config = DecodeConfig(beam_size=beam_size, max_tokens=original.sizes["entry_length"], length_penalty=1.0, stop="")
    decode = functools.partial(
        beam_search, ClipCap(original.config), config=config, end_token=original.sizes["stop_token"]
    )
    return jax.device_get(jax.jit(decode)(original.params, original.arrays["clip_embedding"]))


def test_beams_are_the_same_in_the_same_order(original: Original) -> None:
    found = search(original, original.sizes["beam_size"])
    for tokens, lengths, expected in zip(found.tokens, found.lengths, original.sizes["generation"], strict=True):
        assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected["beams"]


def test_greedy_is_generate2(original: Original) -> None:
    found = search(original, beam_size=1)
    captions = [tokens[0, : length[0]].tolist() for tokens, length in zip(found.tokens, found.lengths, strict=True)]
    assert captions == [expected["generate2"] for expected in original.sizes["generation"]]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_clip_image_embeddings(kind: str) -> None:
    config, params, arrays = load_clip(kind)
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        embeddings = jax.jit(tower(config, jnp.dtype("float32")).apply)({"params": params}, pixels)
    assert_close(embeddings, arrays["image_embeds"])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_clip_sizes_are_read_from_the_shapes(kind: str) -> None:
    config, _, _ = load_clip(kind)
    sizes = json.loads((DATA / f"openai_clip_{kind}.json").read_text())
    layers = sizes["vision_layers"]
    assert config == (
        ClipVitConfig(
            sizes["image_resolution"],
            sizes["vision_patch_size"],
            sizes["vision_width"],
            layers,
            sizes["heads"],
            sizes["embed_dim"],
        )
        if kind == "vit"
        else ClipResnetConfig(
            sizes["image_resolution"], sizes["vision_width"], tuple(layers), sizes["heads"], sizes["embed_dim"]
        )
    )
