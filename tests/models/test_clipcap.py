import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from random_models import clipcap_config, random_embeddings, random_params, random_tokens

from clipcap_jax.models import clip_resnet, clip_vit, gpt2
from clipcap_jax.models.clipcap import ClipCap, ClipCapConfig
from clipcap_jax.models.mapper import MapperConfig
from clipcap_jax.training.loss import caption_loss

Precision = Literal["default", "high", "highest"]

BATCH, TOKENS = 3, 5
EMBEDDINGS = random_embeddings(0, BATCH)
CAPTIONS = random_tokens(0, BATCH, TOKENS)
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)
TOWER = clip_vit.ClipVitConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, embedding_width=6)


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
@pytest.mark.parametrize(("tower", "language_model"), list(zip(clip_vit.PRESETS, gpt2.PRESETS, strict=True)))
def test_shapes_of_the_presets(tower: str, language_model: str, mapper: Literal["mlp", "transformer"]) -> None:
    clip, language = clip_vit.PRESETS[tower], gpt2.PRESETS[language_model]
    config = ClipCapConfig(clip, MapperConfig(mapper, 10, 10, 8, 8, 0.0), language, True, "bfloat16", "default")
    model = ClipCap(config)
    images = jax.ShapeDtypeStruct((2, clip.image_size, clip.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images, tokens)
    assert logits == jax.ShapeDtypeStruct((2, 7, 50257), jnp.float32)
    assert set(variables["params"]) == {"clip", "mapper", "gpt2"}
    embed = functools.partial(model.apply, method="embed")
    assert jax.eval_shape(embed, variables, images) == jax.ShapeDtypeStruct((2, clip.embedding_width), jnp.float32)
    prefix = functools.partial(model.apply, method="prefix")
    assert jax.eval_shape(prefix, variables, images) == jax.ShapeDtypeStruct((2, 10, language.width), jnp.bfloat16)


@pytest.fixture(scope="module", params=["mlp", "transformer"])
def model(request: pytest.FixtureRequest) -> ClipCap:
    return ClipCap(clipcap_config(mapper=request.param))


@pytest.fixture(scope="module")
def params(model: ClipCap) -> Any:
    return random_params(model, 0, EMBEDDINGS, CAPTIONS)


@pytest.fixture(scope="module")
def logits(model: ClipCap) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, inputs, tokens: model.apply({"params": params}, inputs, tokens))


def test_logits_depend_on_earlier_tokens_and_on_the_image(logits: Callable[..., jax.Array], params: Any) -> None:
    before = logits(params, EMBEDDINGS, CAPTIONS)
    changed = []
    for position in range(TOKENS):
        tokens = CAPTIONS.copy()
        tokens[1, position] = (tokens[1, position] + 1) % 11
        changed.append(np.any(logits(params, EMBEDDINGS, tokens) != before, axis=2))
    # Changed token, image, position: logits at t, which predict token t, are changed by the tokens before t.
    earlier = np.array(
        [
            [0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1],
            [0, 0, 0, 1, 1],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0],
        ]
    )
    np.testing.assert_array_equal(np.array(changed)[:, 1].astype(int), earlier)
    assert not np.array(changed)[:, [0, 2]].any()

    embeddings = EMBEDDINGS.copy()
    embeddings[1, 0] += 1
    seen = np.any(logits(params, embeddings, CAPTIONS) != before, axis=2)
    np.testing.assert_array_equal(seen, np.broadcast_to([[False], [True], [False]], seen.shape))


def test_padding_changes_nothing(model: ClipCap, params: Any) -> None:
    lengths = np.array([5, 3, 1])

    @jax.jit
    def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def loss_sum(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, EMBEDDINGS, tokens)
            return caption_loss(logits, tokens, jnp.asarray(lengths))[0]

        return jax.value_and_grad(loss_sum)(params)

    padded = np.pad(CAPTIONS, ((0, 0), (0, 3)))
    other = np.where(np.arange(8)[None] < lengths[:, None], padded, random_tokens(1, BATCH, 8))
    expected = loss(params, jnp.asarray(padded))
    jax.tree.map(np.testing.assert_array_equal, loss(params, jnp.asarray(other)), expected)
    # With no room for padding the sums are the same up to the order of additions.
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(assert_close, loss(params, jnp.asarray(CAPTIONS)), expected)


def test_prefill_gives_the_first_logits(model: ClipCap, params: Any, logits: Callable[..., jax.Array]) -> None:
    first, cache = model.apply({"params": params}, EMBEDDINGS, 9, method="prefill")
    np.testing.assert_allclose(first, logits(params, EMBEDDINGS, CAPTIONS)[:, 0], rtol=0, atol=1e-5)
    assert {layer.keys.shape for layer in cache} == {(BATCH, 2, 8, 9)}
    assert {layer.values.shape for layer in cache} == {(BATCH, 2, 9, 8)}


def test_normalize_embedding() -> None:
    config = clipcap_config()
    params = random_params(ClipCap(config), 0, EMBEDDINGS, CAPTIONS)

    def prefix(normalize: bool, embeddings: np.ndarray) -> jax.Array:
        model = ClipCap(dataclasses.replace(config, normalize_embedding=normalize))
        return model.apply({"params": params}, embeddings, method="prefix")

    unit = EMBEDDINGS / np.sqrt((EMBEDDINGS**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(prefix(True, 7 * EMBEDDINGS), prefix(False, unit), atol=1e-5)
    assert np.abs(prefix(False, EMBEDDINGS) - prefix(False, unit)).max() > 0.1
    half = EMBEDDINGS.astype(np.float16)  # what data sets store
    np.testing.assert_array_equal(prefix(True, half), prefix(True, half.astype(np.float32)))


def test_images_are_embedded_first() -> None:
    model = ClipCap(dataclasses.replace(clipcap_config(), clip=TOWER))
    params = random_params(model, 0, IMAGES, CAPTIONS)
    embeddings = model.apply({"params": params}, IMAGES, method="embed")
    pixels = clip_vit.normalize_pixels(jnp.asarray(IMAGES))
    tower = clip_vit.ClipVit(TOWER, jnp.dtype("float32"))
    np.testing.assert_allclose(embeddings, tower.apply({"params": params["clip"]}, pixels), atol=1e-5)
    from_images = model.apply({"params": params}, IMAGES, CAPTIONS)
    np.testing.assert_allclose(from_images, model.apply({"params": params}, embeddings, CAPTIONS), atol=1e-5)


def test_images_need_a_tower(model: ClipCap, params: Any) -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        model.apply({"params": params}, IMAGES, CAPTIONS)


@pytest.mark.parametrize(
    ("part", "rate", "first"),
    [("mapper", "dropout", 0), ("gpt2", "dropout", 0), ("gpt2", "word_dropout", 1)],
)
def test_dropout_is_where_it_is_asked_for(model: ClipCap, params: Any, part: str, rate: str, first: int) -> None:
    """Each rate alone, and the first position whose logits it changes: no word stands before the first, and with this
    key the first word of one caption at least is hidden."""
    none = {"mapper": {"dropout": 0.0}, "gpt2": {"dropout": 0.0, "word_dropout": 0.0}}

    def with_rates(rates: dict[str, dict[str, float]]) -> ClipCap:
        parts = {name: dataclasses.replace(getattr(model.config, name), **rates[name]) for name in rates}
        return ClipCap(dataclasses.replace(model.config, **parts))

    def logits(rates: dict[str, dict[str, float]], *dropout: str) -> jax.Array:
        apply = jax.jit(functools.partial(with_rates(rates).apply, dropout=dropout))
        return apply({"params": params}, EMBEDDINGS, CAPTIONS, rngs={"dropout": jax.random.key(2)})

    alone = none | {part: none[part] | {rate: 0.5}}
    without = model.apply({"params": params}, EMBEDDINGS, CAPTIONS)
    changed = np.abs(logits(alone, part) - without).max(axis=(0, 2)) > 0.1  # T
    np.testing.assert_array_equal(changed, np.arange(TOKENS) >= first)
    others = {"mapper", "gpt2"} - {part}
    np.testing.assert_allclose(logits(alone, *others), without, atol=1e-5)
    with pytest.raises(InvalidRngError):
        with_rates(alone).apply({"params": params}, EMBEDDINGS, CAPTIONS, dropout=(part,))


def test_bfloat16_stays_close_and_keeps_float32_where_it_matters(model: ClipCap, params: Any) -> None:
    """bfloat16 rounds by up to 2^-9 and each of 2 + 2 layers rounds some ten times in a row: 10% is what that may add
    up to, and far from what a wrong formula gives."""
    low = ClipCap(dataclasses.replace(model.config, dtype="bfloat16"))
    fresh = jax.eval_shape(low.init, jax.random.key(0), EMBEDDINGS, CAPTIONS)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}

    def loss(params: Any, model: ClipCap) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, EMBEDDINGS, CAPTIONS)
        return caption_loss(logits, jnp.asarray(CAPTIONS), jnp.full(BATCH, TOKENS))[0], logits

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (low_loss, low_logits), low_gradients = grad(params, low)
    (high_loss, high_logits), _ = grad(params, model)
    assert {leaf.dtype for leaf in jax.tree.leaves((low_loss, low_logits, low_gradients))} == {jnp.dtype("float32")}
    assert 0 < np.abs(low_logits - high_logits).max() <= 0.1 * np.abs(high_logits).max()
    np.testing.assert_allclose(low_loss, high_loss, rtol=0.05)

    first, cache = low.apply({"params": params}, EMBEDDINGS, 9, method="prefill")
    assert first.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("precision", get_args(Precision))
def test_matmul_precision_reaches_every_product(precision: Precision) -> None:
    config = dataclasses.replace(clipcap_config(mapper="transformer"), clip=TOWER, matmul_precision=precision)
    model = ClipCap(config)
    params = random_params(model, 0, IMAGES, CAPTIONS)

    def loss(params: Any) -> jax.Array:
        return model.apply({"params": params}, IMAGES, CAPTIONS).sum()

    def decode(params: Any) -> jax.Array:
        _, cache = model.apply({"params": params}, IMAGES, 4, method="prefill")
        tokens, mask = jnp.zeros((BATCH, 1), jnp.int32), jnp.ones((BATCH, 1, 4), bool)
        reader = model.apply({"params": params}, method="reader")
        return model.apply({"params": params}, reader, tokens, 3, 3, mask, cache, method="extend")[0]

    for function in (loss, jax.grad(loss), decode):
        jaxpr = str(jax.make_jaxpr(function)(params))
        products = re.findall(r"\b(?:dot_general|conv_general_dilated)\[", jaxpr)
        precisions = re.findall(r"\bprecision=(.*)", jaxpr)
        name = precision.upper()
        assert len(products) > 20
        assert precisions == [f"(Precision.{name}, Precision.{name})"] * len(products)


@pytest.mark.parametrize(
    ("mapper", "trained", "millions"),
    [
        ("mlp", ("mapper",), 31.96),
        ("mlp", ("mapper", "gpt2"), 156.40),
        ("transformer", ("mapper",), 42.73),
        ("transformer", ("mapper", "gpt2"), 167.17),
    ],
)
def test_the_papers_parameter_counts(
    mapper: Literal["mlp", "transformer"], trained: tuple[str, ...], millions: float
) -> None:
    """The four variants of the paper's table 1, which counts 32, 156, 43 and 167 million, with RN50x4 and P=C=10."""
    config = MapperConfig(mapper, prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.0)
    model = ClipCap(ClipCapConfig(None, config, gpt2.PRESETS["gpt2"], False, "float32", "default"))
    embeddings = jnp.zeros((1, clip_resnet.PRESETS["RN50x4"].embedding_width))
    params = jax.eval_shape(model.init, jax.random.key(0), embeddings, jnp.zeros((1, 2), jnp.int32))["params"]
    count = sum(leaf.size for part in trained for leaf in jax.tree.leaves(params[part]))
    assert round(count / 1e6, 2) == millions
