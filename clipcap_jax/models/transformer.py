"""The pre-layer-norm transformer that the CLIP tower, the transformer mapper and GPT-2 share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = Callable[..., jax.Array]
Layers = tuple[Any, ...]  # the parameters of each

EPSILON = 1e-5  # layer norms of CLIP, of GPT-2 and torch's default, which the original's mapper takes


def _as_it_is(x: Any) -> Any:
    return x


class Hooks(NamedTuple):
    """What a training step may put into a model, to spread it over devices and memory; by default, nothing.

    None changes a value. Functions are called at the few places where they matter: `rows` on activations that begin
    with an axis of the batch, `whole` on parameters just before they are used, `layer` on the function that applies one
    layer. `unroll`: whether there is a copy of the program for each layer, instead of a loop.
    """

    rows: Callable[[jax.Array], jax.Array] = _as_it_is
    whole: Callable[[Any], Any] = _as_it_is
    layer: Callable[[Callable[..., Any]], Callable[..., Any]] = _as_it_is
    unroll: bool = False


class LayerCache(NamedTuple):
    """Keys, `B H K S`, and values, `B H S K`, of one layer; slots not yet written hold zeros and are masked.

    They lie as CPUs read them in the two products of `attention`; keys `B H S K` would be transposed for every token.
    """

    keys: jax.Array
    values: jax.Array


def attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Scaled dot-product attention, its softmax in float32.

    Args:
      query: `B H L K`.
      keys, values: `B H S K`.
      mask: boolean, broadcastable to `B H L S`, true where attention may look; None: all.
      drop: dropout, or nothing, on the weights.

    Returns:
      `B H L K`, of the values' dtype.
    """
    scores = jnp.einsum("bhlk,bhsk->bhls", query, keys, preferred_element_type=jnp.float32)
    scores = scores / jnp.sqrt(jnp.float32(query.shape[-1]))  # B H L S
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores).astype(values.dtype))
    return jnp.einsum("bhls,bhsk->bhlk", weights, values)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      heads: attention heads; the width must be a multiple of it.
      mlp_width: hidden width of the MLP.
      activation: the MLP's non-linearity.
      qkv_bias: whether the query, key and value projections have biases.
      dropout: rate, on attention weights and on both branches' outputs (GPT-2's three places).
      dtype: compute dtype; parameters are float32, softmax and norms are computed in float32.
      kernel_init, residual_init: initialisers, the second for the two projections that feed the residual stream.
    """

    heads: int
    mlp_width: int
    activation: Callable[[jax.Array], jax.Array]
    qkv_bias: bool
    dropout: float
    dtype: jnp.dtype
    kernel_init: Initializer
    residual_init: Initializer

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        *,
        cache: LayerCache | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache]:
        """Apply the block.

        Args:
          x: `B L D`.
          mask: boolean, broadcastable to `B H L S` (S is L without a cache), true where attention may look; None: all.
          cache: keys and values to write into and attend over; None: attend over `x` itself.
          slot: the first cache slot to write.
          deterministic: no dropout.

        Returns:
          The new `x`, `B L D`, and the keys and values that were attended over.
        """
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        norm = functools.partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        y = norm(name="norm_1")(x)
        qkv = dense(3 * width, use_bias=self.qkv_bias, name="qkv")(y)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)  # B L 3 H K
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # each B H L K
        key = key.swapaxes(-1, -2)  # B H K L
        if cache is None:
            cache = LayerCache(key, value)
        else:
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.keys, key, (0, 0, 0, slot)),
                jax.lax.dynamic_update_slice(cache.values, value, (0, 0, slot, 0)),
            )
        y = attention(query, cache.keys.swapaxes(-1, -2), cache.values, mask, drop)
        y = y.swapaxes(1, 2).reshape(x.shape)  # B L D
        x = x + drop(dense(width, kernel_init=self.residual_init, name="attention_out")(y))

        y = dense(self.mlp_width, name="mlp_in")(norm(name="norm_2")(x))
        y = dense(width, kernel_init=self.residual_init, name="mlp_out")(self.activation(y))
        return x + drop(y), cache


class Transformer(nn.Module):
    """`layers` blocks whose parameters are stacked on a leading axis N.

    Stacked, the layers are scanned over: one block to compile instead of N, and few leaves for the optimiser. Decoding
    takes them apart and unrolls them, because a scan that carries the cache would copy it at every step.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Initializer
    residual_init: Initializer
    dtype: jnp.dtype
    qkv_bias: bool = True
    dropout: float = 0.0
    hooks: Hooks = Hooks()

    def setup(self) -> None:
        self.block = Block(
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            dropout=self.dropout,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            residual_init=self.residual_init,
            parent=None,  # applied by hand below, with one layer's slice of the stacked parameters
        )
        self.stacked = self.param("layers", self._init_layers)

    def _init_layers(self, key: jax.Array) -> Any:
        def init_layer(key: jax.Array) -> Any:
            return self.block.init(key, jnp.zeros((1, 1, self.width), self.dtype), None)["params"]

        return jax.vmap(init_layer)(jax.random.split(key, self.layers))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True) -> jax.Array:
        """`B L D` to `B L D`; `mask` as in `Block`."""
        return self._scan(x, mask, deterministic=deterministic)[0]

    def prefill(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, LayerCache]:
        """As `__call__`, without dropout; and the layers' keys and values, `N B H K L` and `N B H L K`."""
        x, cache = self._scan(x, mask, keep=True)
        assert cache is not None
        return x, cache

    def _scan(
        self, x: jax.Array, mask: jax.Array | None, *, deterministic: bool = True, keep: bool = False
    ) -> tuple[jax.Array, LayerCache | None]:
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), self.layers)

        @self.hooks.layer
        def layer(x: jax.Array, params_and_key: tuple[Any, jax.Array | None]) -> tuple[jax.Array, LayerCache | None]:
            params, key = params_and_key
            params = self.hooks.whole(params)
            rngs = {} if key is None else {"dropout": key}
            x, cache = self.block.apply({"params": params}, x, mask, deterministic=deterministic, rngs=rngs)
            return self.hooks.rows(x), cache if keep else None

        return jax.lax.scan(layer, self.hooks.rows(x), (self._matrices_in_dtype(), keys), unroll=self.hooks.unroll)

    def _matrices_in_dtype(self) -> Any:
        # In the dtype that they are used in, now and not a layer at a time: so `whole` moves half as much where that is
        # half as wide, and the backward pass finds them here.
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 2 else leaf, self.stacked)

    def unstacked(self) -> Layers:
        """The parameters as `extend` takes them."""
        stacked = self._matrices_in_dtype()
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.layers))

    def extend(
        self, layers: Layers, x: jax.Array, mask: jax.Array, cache: tuple[LayerCache, ...], slot: jax.Array | int
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """As `__call__`, writing keys and values to `cache` from `slot` on and attending over all its slots.

        Args:
          layers: the parameters, from `unstacked`: what is called again and again need not take them apart each time.
          x: `B L D`, the new positions.
          mask: boolean, broadcastable to `B H L S`.
          cache: one `LayerCache` per layer.
          slot: the first slot to write.

        Returns:
          The new `x` and the cache with the new keys and values in it.
        """
        new = []
        for params, layer_cache in zip(layers, cache, strict=True):
            x, layer_cache = self.block.apply({"params": params}, x, mask, cache=layer_cache, slot=slot)
            new.append(layer_cache)
        return x, tuple(new)
