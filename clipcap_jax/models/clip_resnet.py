"""CLIP's modified ResNets (Radford et al. 2021, section 2.4; openai/CLIP, clip/model.py, `ModifiedResNet`).

They differ from the common ResNet in a stem of three convolutions, in average pooling before every convolution that
would have had a stride (against aliasing), and in attention instead of an average at the end.

A batch norm with fixed statistics is an affine map of each channel, and that of a convolution's output is another
convolution: the pretrained norms are folded into kernels and biases (`convert/clip.py`), and there are none here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class ClipResnetConfig:
    """Sizes of the tower.

    Attributes:
      image_size: in pixels, a multiple of 32.
      width: channels after the stem; the last feature map has 32 times as many.
      blocks: bottleneck blocks of each of the four stages.
      heads: of the attention pooling.
      embedding_width: E.
    """

    image_size: int
    width: int
    blocks: tuple[int, int, int, int]
    heads: int
    embedding_width: int


PRESETS = {
    "RN50": ClipResnetConfig(image_size=224, width=64, blocks=(3, 4, 6, 3), heads=32, embedding_width=1024),
    "RN101": ClipResnetConfig(image_size=224, width=64, blocks=(3, 4, 23, 3), heads=32, embedding_width=512),
    "RN50x4": ClipResnetConfig(image_size=288, width=80, blocks=(4, 6, 10, 6), heads=40, embedding_width=640),
    "RN50x16": ClipResnetConfig(image_size=384, width=96, blocks=(6, 8, 18, 8), heads=48, embedding_width=768),
    "RN50x64": ClipResnetConfig(image_size=448, width=128, blocks=(3, 15, 36, 10), heads=64, embedding_width=1024),
}

_KERNEL_INIT = nn.initializers.he_normal()


def _average(x: jax.Array, size: int) -> jax.Array:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input goes; `4 * width` channels come out, on a grid `stride`
    times coarser."""

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`B H W C` to `B H/stride W/stride 4*width`."""
        conv = functools.partial(nn.Conv, dtype=self.dtype, kernel_init=_KERNEL_INIT)
        y = nn.relu(conv(self.width, (1, 1), name="conv_1")(x))
        y = nn.relu(conv(self.width, (3, 3), padding=1, name="conv_2")(y))
        y = conv(4 * self.width, (1, 1), name="conv_3")(_average(y, self.stride))
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = conv(4 * self.width, (1, 1), name="shortcut")(_average(x, self.stride))
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """The mean of all positions asks, the mean and the positions answer."""

    heads: int
    embedding_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`B H W C` to `B E`."""
        batch, width = x.shape[0], x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(width**-0.5))
        x = x.reshape(batch, -1, width)  # B I C
        x = jnp.concatenate([x.mean(axis=1, keepdims=True, dtype=jnp.float32).astype(self.dtype), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(width**-0.5), x.shape[1:])
        x = x + positions[None].astype(self.dtype)  # B I+1 C
        query = dense(width, name="query")(x[:, 0]).reshape(batch, self.heads, -1)  # B H K
        key = dense(width, name="key")(x).reshape(batch, -1, self.heads, width // self.heads)  # B I+1 H K
        value = dense(width, name="value")(x).reshape(key.shape)
        scores = jnp.einsum("bhk,bihk->bhi", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / jnp.sqrt(jnp.float32(query.shape[-1]))).astype(self.dtype)
        x = jnp.einsum("bhi,bihk->bhk", weights, value).reshape(batch, width)  # B C
        return dense(self.embedding_width, name="projection")(x)  # B E


class ClipResnet(nn.Module):
    """Normalised pixels to CLIP embeddings."""

    config: ClipResnetConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels, float `B H W 3`, to embeddings, float32 `B E`: as `ClipVit`."""
        config = self.config
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype, kernel_init=_KERNEL_INIT)
        x = pixels.astype(self.dtype)
        x = nn.relu(conv(config.width // 2, strides=2, name="stem_1")(x))
        x = nn.relu(conv(config.width // 2, name="stem_2")(x))
        x = nn.relu(conv(config.width, name="stem_3")(x))
        x = _average(x, 2)  # B H/4 W/4 width
        for stage, blocks in enumerate(config.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage_{stage + 1}_block_{block + 1}"
                x = Bottleneck(config.width * 2**stage, stride, self.dtype, name=name)(x)
        x = AttentionPool(config.heads, config.embedding_width, self.dtype, name="pool")(x)  # B E
        return x.astype(jnp.float32)
