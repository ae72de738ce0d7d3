import dataclasses
import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytorch import import_torch
from random_models import random_params, random_tokens, zero_params

from clipcap_jax.convert import gpt2
from clipcap_jax.models.gpt2 import PRESETS, Gpt2, Gpt2Config

PREFIX, STEPS, BEAMS = 3, 5, 4
CONFIG = Gpt2Config(vocab_size=11, positions=16, width=16, layers=2, heads=2, dropout=0.5, word_dropout=0.5)
MODEL = Gpt2(CONFIG, jnp.dtype("float32"))

Variables = dict[str, Any]


@pytest.fixture(scope="module")
def variables() -> Variables:
    return {"params": random_params(MODEL, 0, np.zeros((1, 1, 16), np.float32))}


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_sizes(name: str, count: int) -> None:
    """The counts of `GPT2LMHeadModel.num_parameters()` for OpenAI's four models."""
    model = Gpt2(PRESETS[name], jnp.dtype("float32"))
    embeddings = jax.ShapeDtypeStruct((2, 20, PRESETS[name].width), jnp.float32)
    hidden, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), embeddings)
    assert hidden.shape == embeddings.shape
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_every_position_sees_itself_and_what_stands_before_it(variables: Variables) -> None:
    embeddings = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: MODEL.apply(variables, x).sum(axis=2)))(embeddings)  # 2 6 2 6 16
    seen = np.abs(jacobian).max(axis=4) > 0  # image, position, image seen, position seen
    causal = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1],
        ]
    )
    np.testing.assert_array_equal(seen[0, :, 0].astype(int), causal)
    np.testing.assert_array_equal(seen[1, :, 1].astype(int), causal)
    assert not seen[0, :, 1].any()
    assert not seen[1, :, 0].any()


def full_logits(model: Gpt2, prefix: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits after the prefix and after every token, without a cache."""
    hidden = model(jnp.concatenate([prefix, model.embed(tokens)], axis=1))
    return model.logits(hidden[:, prefix.shape[1] - 1 :])


@pytest.mark.parametrize("beams", [1, BEAMS])
def test_cached_equals_uncached(variables: Variables, beams: int) -> None:
    """Hypotheses that branch at random: each continues one of the step before, in any order, some of them none."""
    random, batch = np.random.default_rng(beams), 2
    prefix = random.normal(size=(batch, PREFIX, CONFIG.width)).astype(np.float32)
    slots = PREFIX + STEPS * beams
    first, cache = MODEL.apply(variables, prefix, slots, method="prefill")
    reader = MODEL.apply(variables, method="reader")
    extend = jax.jit(functools.partial(MODEL.apply, method="extend"))
    uncached = jax.jit(functools.partial(MODEL.apply, method=full_logits))

    tokens = np.zeros((batch, beams, STEPS), np.int32)
    held_in = np.zeros((batch, beams, STEPS), int)  # the slots of those tokens
    for step in range(STEPS):
        for image in range(batch):
            parents = random.integers(0, beams, beams)
            tokens[image], held_in[image] = tokens[image, parents], held_in[image, parents]
        tokens[:, :, step] = random.integers(CONFIG.vocab_size, size=(batch, beams))
        held_in[:, :, step] = PREFIX + step * beams + np.arange(beams)
        mask = np.zeros((batch, beams, slots), bool)
        mask[:, :, :PREFIX] = True
        np.put_along_axis(mask, held_in[:, :, : step + 1], True, axis=2)
        logits, cache = extend(variables, reader, tokens[:, :, step], PREFIX + step, PREFIX + step * beams, mask, cache)

        expected = uncached(variables, np.repeat(prefix, beams, axis=0), tokens.reshape(batch * beams, STEPS))
        expected = expected.reshape(batch, beams, STEPS + 1, CONFIG.vocab_size)
        np.testing.assert_allclose(first, expected[:, 0, 0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits[..., : CONFIG.vocab_size], expected[:, :, step + 1], rtol=0, atol=1e-5)


def test_gradients_of_the_logits(variables: Variables) -> None:
    """In float32 those of a plain product; in bfloat16, of operands in bfloat16 alone."""
    random = np.random.default_rng(0)
    hidden, table = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 3, 16), (11, 16)))

    def loss(model: Gpt2, hidden: jax.Array, table: jax.Array) -> jax.Array:
        params = {**variables["params"], "token_embeddings": table}
        return jnp.sin(model.apply({"params": params}, hidden, method="logits")).sum()

    gradients = jax.grad(loss, argnums=(1, 2))
    expected = jax.grad(lambda hidden, table: jnp.sin(hidden @ table.T).sum(), argnums=(0, 1))(hidden, table)
    for found, one in zip(jax.jit(gradients, static_argnums=0)(MODEL, hidden, table), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)

    low = Gpt2(CONFIG, jnp.dtype("bfloat16"))
    text = str(jax.make_jaxpr(gradients, static_argnums=0)(low, hidden.astype("bfloat16"), table))
    operands = re.findall(r"= dot_general\[.*?\] (\w+) (\w+)", text, re.DOTALL)
    assert len(operands) >= 3
    types = dict(re.findall(r"(\w+):(\w+)\[", text))
    assert {types[name] for pair in operands for name in pair} == {"bf16"}


@pytest.mark.parametrize("ones", ["embeddings", "positions", "attention_out", "mlp_out"])
def test_dropout(ones: str) -> None:
    """Where one of them alone is 1 and all else 0, what was dropped is below the mean that the last norm takes away."""
    model = Gpt2(dataclasses.replace(CONFIG, dropout=0.25), jnp.dtype("float32"))
    embeddings = jnp.full((50, 16, 16), float(ones == "embeddings"))
    params = zero_params(model, embeddings)
    params["final_norm"]["scale"] = jnp.ones(16)
    if ones == "positions":
        params["position_embeddings"] = jnp.ones((16, 16))
    elif ones != "embeddings":
        bias = params["transformer"]["layers"][ones]["bias"]
        params["transformer"]["layers"][ones]["bias"] = bias.at[0].set(1)
    apply = jax.jit(model.apply, static_argnames="deterministic")
    assert not apply({"params": params}, embeddings).any()
    rngs = {"dropout": jax.random.key(1)}
    hidden = apply({"params": params}, embeddings, deterministic=False, rngs=rngs)
    assert abs((hidden < 0).mean() - 0.25) < 0.02  # 5 standard deviations


def test_fresh_parameters() -> None:
    """Each as wide as its comment in `Gpt2.setup` says; those that add to the residual stream, of which there are two a
    layer, so much narrower that together they add as much as one."""
    config = dataclasses.replace(CONFIG, vocab_size=300, positions=200, width=64, layers=3)
    model = Gpt2(config, jnp.dtype("float32"))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    layers = params["transformer"]["layers"]
    drawn = {
        name: (layer, width)
        for part, width in {"qkv": 64, "mlp_in": 64, "attention_out": 2 * 3 * 64, "mlp_out": 2 * 3 * 64}.items()
        for name, layer in ((f"{part} {i}", layer) for i, layer in enumerate(layers[part]["kernel"]))
    }
    drawn |= {name: (params[name], 64) for name in ("token_embeddings", "position_embeddings")}
    for name, (leaf, width) in drawn.items():
        assert np.std(leaf) == pytest.approx(width**-0.5, rel=0.04), name  # 4 standard deviations of the smallest
    assert len({float(leaf.ravel()[0]) for leaf, _ in drawn.values()}) == len(drawn)  # none is a copy
    constant = [layers[part][name] for part in layers for name in ("bias", "scale") if name in layers[part]]
    assert {float(value) for leaf in constant for value in np.unique(leaf)} == {0, 1}


def test_word_dropout_hides_whole_tokens_and_leaves_the_others(variables: Variables) -> None:
    tokens = np.full((40, 50), 7)
    embed = functools.partial(MODEL.apply, variables, tokens, method="embed")
    dropped = embed(deterministic=False, rngs={"dropout": jax.random.key(1)})
    gone = (dropped == 0).all(axis=2)
    np.testing.assert_array_equal(dropped[~gone], embed()[~gone])
    assert abs(gone.mean() - 0.5) < 0.05  # 4.5 standard deviations


def test_equals_transformers() -> None:
    """The same logits from embeddings as `GPT2LMHeadModel`, for a model with random biases and norms."""
    torch = import_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and torch about each other
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        theirs = GPT2LMHeadModel(config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        prefix = torch.randn((2, PREFIX, 16), generator=generator)
        tokens = random_tokens(0, 2, STEPS)
        with torch.no_grad():
            embedded = theirs.transformer.wte(torch.from_numpy(tokens))
            expected = theirs(inputs_embeds=torch.cat([prefix, embedded], dim=1)).logits.numpy()

    _, params = gpt2.from_arrays({name: value.numpy() for name, value in theirs.state_dict().items()}, "a test", 2)
    ours = MODEL.apply({"params": params}, prefix.numpy(), tokens, method=full_logits)
    expected = expected[:, PREFIX - 1 :]
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
