from typing import Any

import jax
import numpy as np
import pytest

from clipcap_jax.convert.mapping import Source, conv, linear, load, norm, same, store
from clipcap_jax.errors import UserError

LAYERS = 3
TABLE = {
    **same("constants", "prefix_const"),
    **norm("norm", "ln"),
    **conv("stem", "conv1"),
    **linear("block/layers/mlp", "h.{layer}.fc"),
    "block/layers/qkv/kernel": Source(("h.{layer}.q", "h.{layer}.kv"), "linear", (1, 2)),
}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"prefix_const": (2, 4), "ln.weight": (4,), "ln.bias": (4,), "conv1.weight": (5, 3, 2, 1)}
    shapes["conv1.bias"] = (5,)
    for i in range(LAYERS):
        shapes |= {f"h.{i}.fc.weight": (6, 4), f"h.{i}.fc.bias": (6,), f"h.{i}.q": (4, 4), f"h.{i}.kv": (8, 4)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


SHAPES: Any = {
    "constants": (2, 4),
    "norm": {"scale": (4,), "bias": (4,)},
    "stem": {"kernel": (2, 1, 3, 5), "bias": (5,)},
    "block": {"layers": {"mlp": {"kernel": (LAYERS, 4, 6), "bias": (LAYERS, 6)}, "qkv": {"kernel": (LAYERS, 4, 12)}}},
}
SHAPES = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def test_every_layout(tensors: dict[str, np.ndarray]) -> None:
    params = load(TABLE, SHAPES, tensors, {}, "a file")
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, SHAPES)
    np.testing.assert_array_equal(params["constants"], tensors["prefix_const"])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["ln.weight"])
    assert params["stem"]["kernel"][1, 0, 2, 4] == tensors["conv1.weight"][4, 2, 1, 0]
    layer = jax.tree.map(lambda leaf: leaf[2], params["block"]["layers"])
    np.testing.assert_array_equal(layer["mlp"]["kernel"], tensors["h.2.fc.weight"].T)
    np.testing.assert_array_equal(layer["qkv"]["kernel"][:, :4], tensors["h.2.q"].T)
    np.testing.assert_array_equal(layer["qkv"]["kernel"][:, 4:], tensors["h.2.kv"].T)


def test_out_is_the_inverse_of_in(tensors: dict[str, np.ndarray]) -> None:
    stored = store(TABLE, load(TABLE, SHAPES, tensors, {}, "a file"))
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(stored[name], tensor)
        assert stored[name].flags.c_contiguous


def test_half_precision_becomes_float32(tensors: dict[str, np.ndarray]) -> None:
    tensors["ln.bias"] = tensors["ln.bias"].astype(np.float16)
    bias = load(TABLE, SHAPES, tensors, {}, "a file")["norm"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, tensors["ln.bias"].astype(np.float32))


def test_all_that_is_wrong_is_told_at_once(tensors: dict[str, np.ndarray]) -> None:
    tensors["layernorm.weight"] = tensors.pop("ln.weight")  # renamed
    tensors["h.1.fc.weight"] = tensors["h.1.fc.weight"].T  # transposed
    tensors["h.2.kv"][3, 1] = np.nan
    tensors["h.0.attn.bias"] = np.ones(1)
    tensors["h.0.other"] = np.ones(1)
    with pytest.raises(UserError) as raised:
        load(TABLE, SHAPES, tensors, {r"h\.\d\.attn\.bias": "a mask"}, "model.bin")
    assert str(raised.value) == (
        "model.bin does not hold the weights of this architecture. 5 tensors are wrong:\n"
        "  h.1.fc.weight has the shape (4, 6), where (6, 4) is needed\n"
        "  h.2.kv holds values that are not finite\n"
        "  ln.weight is not there\n"
        "  h.0.other is not known\n"
        "  layernorm.weight is not known"
    )


def test_a_message_is_not_endless(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"(?s)17 tensors are wrong:\n(  .*\n){10}  \.\.\. and 7 more$"):
        load(TABLE, SHAPES, {}, {}, "an empty file")


def test_what_is_ignored_has_to_match_the_whole_name(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"h\.0\.attn\.bias_2 is not known"):
        load(TABLE, SHAPES, {**tensors, "h.0.attn.bias_2": np.ones(1)}, {r"h\.\d\.attn\.bias": "a mask"}, "a file")
