"""CLIP's vision transformer (Radford et al. 2021; openai/CLIP, clip/model.py, `VisionTransformer`)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipcap_jax.models.transformer import EPSILON, Transformer

# The pixel statistics that every OpenAI CLIP was trained with.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipVitConfig:
    """Sizes of the tower. `image_size` and `patch_size` in pixels; `embedding_width` is E."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    embedding_width: int


PRESETS = {
    "ViT-B/32": ClipVitConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, embedding_width=512),
    "ViT-B/16": ClipVitConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, embedding_width=512),
    "ViT-L/14": ClipVitConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, embedding_width=768),
    "ViT-L/14@336px": ClipVitConfig(
        image_size=336, patch_size=14, width=1024, layers=24, heads=16, embedding_width=768
    ),
}


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def normalize_pixels(images: jax.Array) -> jax.Array:
    """uint8 `B H W 3` to float32 with OpenAI's channel statistics."""
    mean, std = (jnp.array(v, jnp.float32)[None, None, None, :] for v in (PIXEL_MEAN, PIXEL_STD))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def clip_transformer(width: int, layers: int, heads: int, dtype: jnp.dtype) -> Transformer:
    """The transformer of both towers, as the submodule "transformer"."""
    return Transformer(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        activation=quick_gelu,
        kernel_init=nn.initializers.normal(width**-0.5),
        residual_init=nn.initializers.normal((2 * width * layers) ** -0.5),
        dtype=dtype,
        name="transformer",
    )


class ClipVit(nn.Module):
    """Normalised pixels to CLIP embeddings."""

    config: ClipVitConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Embed images.

        Args:
          pixels: float `B H W 3`, normalised, H and W equal to `config.image_size`.

        Returns:
          float32 `B E`: the class token's projection, not normalised.
        """
        config = self.config
        patch = config.patch_size
        init = nn.initializers.normal(config.width**-0.5)
        x = nn.Conv(
            config.width, (patch, patch), (patch, patch), "VALID", use_bias=False, dtype=self.dtype, name="patches"
        )(pixels.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, config.width)  # B I width
        class_token = self.param("class_token", init, (config.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (x.shape[0], 1, config.width)), x], axis=1)  # B I+1 width
        x = x + self.param("positions", init, x.shape[1:])[None].astype(self.dtype)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm_before")(x)
        x = clip_transformer(config.width, config.layers, config.heads, self.dtype)(x)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm_after")(x[:, 0])  # B width
        x = nn.Dense(config.embedding_width, use_bias=False, kernel_init=init, dtype=self.dtype, name="projection")(x)
        return x.astype(jnp.float32)  # B E
