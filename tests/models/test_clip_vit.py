import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from clipcap_jax.models.clip_vit import PRESETS, ClipVit, ClipVitConfig, normalize_pixels

FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-B/32", 87_849_216),
        ("ViT-B/16", 86_192_640),
        ("ViT-L/14", 303_966_208),
        ("ViT-L/14@336px", 304_293_888),
    ],
)
def test_sizes(name: str, count: int) -> None:
    """The counts of the `visual` part of OpenAI's models."""
    config = PRESETS[name]
    pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    embeddings, variables = jax.eval_shape(ClipVit(config, FLOAT32).init_with_output, jax.random.key(0), pixels)
    assert embeddings.shape == (2, 768 if "L" in name else 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_normalize_pixels() -> None:
    """As `Normalize` in openai/CLIP, clip/clip.py, `_transform`."""
    images = np.array([[[[0, 0, 0], [255, 255, 255], [122, 116, 104]]]], np.uint8)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    normalized = normalize_pixels(jnp.asarray(images))
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, (images / 255 - mean) / std, atol=1e-6)


def test_an_embedding_depends_on_every_pixel_of_its_own_image() -> None:
    config = ClipVitConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, embedding_width=5)
    pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    tower = ClipVit(config, FLOAT32)
    params = random_params(tower, 0, pixels)
    jacobian = jax.jit(jax.jacrev(lambda x: tower.apply({"params": params}, x)))(pixels)  # 2 5 2 8 8 3
    seen = np.broadcast_to(np.eye(2)[:, None, :, None, None, None], jacobian.shape)
    np.testing.assert_array_equal(jacobian != 0, seen)
