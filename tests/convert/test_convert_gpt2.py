import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytorch import arrays, import_torch, save
from pytorch import gpt2 as torch_gpt2
from random_models import random_params, random_tokens

from clipcap_jax.convert import gpt2
from clipcap_jax.convert.mapping import store
from clipcap_jax.errors import UserError
from clipcap_jax.models.gpt2 import PRESETS, Gpt2, Gpt2Config
from clipcap_jax.text.tokenizer import Tokenizer

CONFIG = Gpt2Config(vocab_size=300, positions=20, width=16, layers=2, heads=2, dropout=0.1, word_dropout=0.0)
MODEL = Gpt2(CONFIG, jnp.dtype("float32"))
SIZES = {"vocab_size": 300, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}


@pytest.fixture
def params() -> Any:
    return random_params(MODEL, 0, np.zeros((1, 1, 16), np.float32))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a dog runs", "a cat sleeps"], 270)


def state(params: Any) -> dict[str, np.ndarray]:
    """The tensors under the names of `GPT2Model`."""
    return store(gpt2.TABLE, params)


def full_logits(model: Gpt2, tokens: jax.Array) -> jax.Array:
    return model.logits(model(model.embed(tokens)))


def greedy(config: Gpt2Config, params: Any, tokens: np.ndarray, steps: int) -> list[np.ndarray]:
    """The ids that follow, without the cache and with it."""
    params = jax.tree.map(jnp.asarray, params)
    model, length = Gpt2(config, jnp.dtype("float32")), tokens.shape[1]
    uncached = np.concatenate([tokens, np.zeros((len(tokens), steps), np.int32)], axis=1)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, method=full_logits))
        for i in range(length, length + steps):
            uncached[:, i] = np.argmax(run(uncached)[:, i - 1], axis=1)  # later positions do not matter
        cached = tokens
        embedded = model.apply({"params": params}, tokens, method="embed")
        logits, cache = model.apply({"params": params}, embedded, length + steps, method="prefill")
        reader = model.apply({"params": params}, method="reader")
        extend = jax.jit(lambda *args: model.apply({"params": params}, reader, *args, method="extend"))
        for i in range(length, length + steps):
            following = np.argmax(logits, axis=-1).reshape(-1, 1).astype(np.int32)
            cached = np.concatenate([cached, following], axis=1)
            mask = np.broadcast_to(np.arange(length + steps) <= i, (len(tokens), 1, length + steps))
            logits, cache = extend(following, i, i, mask, cache)
    return [uncached[:, length:], cached[:, length:]]


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        SIZES | {"n_embd": 24, "n_head": 3, "n_layer": 1},
        pytest.param({"vocab_size": 50257}, marks=pytest.mark.slow),  # GPT-2 124M, transformers' defaults
    ],
)
def test_equals_transformers(sizes: dict[str, int], tmp_path: Path) -> None:
    """Logits, and what greedy decoding writes."""
    torch = import_torch()
    theirs = torch_gpt2(scale=0.2 if "n_embd" in sizes else 0.02, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    config, params = gpt2.load_gpt2(str(tmp_path))
    if len(sizes) == 1:
        assert config == PRESETS["gpt2"]
    tokens = random_tokens(0, 2, 8, vocab_size=300)
    with jax.default_matmul_precision("highest"):
        ours = Gpt2(config, jnp.dtype("float32")).apply({"params": params}, tokens, method=full_logits)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        written = theirs.generate(
            torch.from_numpy(tokens), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    for ids in greedy(config, params, tokens, 10):
        np.testing.assert_array_equal(ids, written.numpy()[:, 8:])


def test_out_and_in_again(params: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tmp_path /= "gpt2"
    gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.parent.iterdir()] == ["gpt2"]
    config, again = gpt2.load_gpt2(str(tmp_path))
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again, params)
    texts = ["a dog sleeps", "ein Hund ☃"]
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.encode(texts) == tokenizer.encode(texts)
    assert loaded.end_id == tokenizer.end_id


def test_transformers_reads_what_comes_out(params: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch = import_torch()
    tmp_path /= "gpt2"
    gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path)
    tokens = random_tokens(0, 2, 8, vocab_size=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer, GPT2LMHeadModel

        theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
        assert AutoTokenizer.from_pretrained(tmp_path)("a dog runs").input_ids == tokenizer.encode(["a dog runs"])[0]
    assert not report["unexpected_keys"]
    assert not report["missing_keys"] - {"lm_head.weight"}
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    ours = MODEL.apply({"params": params}, tokens, method=full_logits)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_bin_file_with_prefix_buffers_and_head(params: Any, tmp_path: Path) -> None:
    """As `pytorch_model.bin` of older repositories."""
    old = {f"transformer.{name}": value for name, value in state(params).items()}
    old["lm_head.weight"] = old["transformer.wte.weight"]
    for i in range(CONFIG.layers):
        old[f"transformer.h.{i}.attn.bias"] = np.ones((1, 1, 20, 20), np.uint8)
        old[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2}))
    config, again = gpt2.load_gpt2(str(tmp_path))
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_heads_of_a_file_alone(params: Any) -> None:
    assert gpt2.from_arrays(state(params), "a file")[0].heads == 1  # the width over 64, or 1
    assert gpt2.from_arrays(state(params), "a file", heads=4)[0].heads == 4
    with pytest.raises(UserError, match="3 heads do not divide the width, 16"):
        gpt2.from_arrays(state(params), "a file", heads=3)


def test_a_head_that_is_not_tied(params: Any) -> None:
    arrays = state(params)
    with pytest.raises(UserError, match="has an output layer of its own; GPT-2's is its token embedding"):
        gpt2.from_arrays({**arrays, "lm_head.weight": arrays["wte.weight"] + 1}, "a file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_models_of_another_kind_are_refused(
    params: Any, tokenizer: Tokenizer, tmp_path: Path, name: str, value: Any
) -> None:
    tmp_path /= "gpt2"
    gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, name: value}))
    with pytest.raises(UserError, match=f"is not a GPT-2 like OpenAI's: its config.json says {name}={value!r}"):
        gpt2.load_gpt2(str(tmp_path))


def test_a_file_of_something_else() -> None:
    with pytest.raises(UserError, match=r"holds no GPT-2: wte\.weight, which shows its size, is not there"):
        gpt2.from_arrays({"bert.embeddings.weight": np.ones((2, 2))}, "a file")


def test_arrays_of_a_model_and_of_its_body_are_the_same() -> None:
    import_torch()
    model = torch_gpt2(**SIZES)
    whole = gpt2.from_arrays(arrays(model), "a file", 2)[1]
    jax.tree.map(np.testing.assert_array_equal, whole, gpt2.from_arrays(arrays(model.transformer), "a file", 2)[1])


def test_a_folder_that_cannot_be_written(params: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already: name another folder"):
        gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path / "file" / "gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_export_leaves_nothing(
    params: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "to_dict", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path / "gpt2")
    assert not list(tmp_path.iterdir())


def test_names_that_come_twice(params: Any) -> None:
    arrays = state(params)
    with pytest.raises(UserError, match=r"with and without the prefix transformer\.: ln_f\.bias"):
        gpt2.from_arrays({**arrays, "transformer.ln_f.bias": arrays["ln_f.bias"]}, "a file")


def test_a_file_without_layers(params: Any) -> None:
    arrays = {name.replace(".ln_1.", ".norm."): array for name, array in state(params).items()}
    with pytest.raises(UserError, match="holds no layers of a GPT-2"):
        gpt2.from_arrays(arrays, "a file")


@pytest.mark.parametrize("content", ["no json", "[]"])
def test_a_broken_config(params: Any, tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    gpt2.save_gpt2(CONFIG, params, tokenizer, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json (is not JSON|does not hold settings by name)"):
        gpt2.load_gpt2(str(tmp_path / "gpt2"))
