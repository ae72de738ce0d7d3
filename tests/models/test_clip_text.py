import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from clipcap_jax.models.clip_text import ClipText, ClipTextConfig

FLOAT32 = jnp.dtype("float32")
CONFIG = ClipTextConfig(vocab_size=19, context_length=9, width=8, layers=2, heads=2, embedding_width=5)
END = 18


@pytest.mark.parametrize(
    ("width", "embedding_width", "count"),
    [(512, 512, 63_428_096), (640, 640, 91_163_520), (768, 768, 123_650_304)],
)
def test_sizes(width: int, embedding_width: int, count: int) -> None:
    """OpenAI's ViT-B/32, RN50x4 and ViT-L/14, without the `visual` part and the logits' scale."""
    config = ClipTextConfig(49408, 77, width, 12, width // 64, embedding_width)
    tokens = jax.ShapeDtypeStruct((2, 30), jnp.int32)
    embeddings, variables = jax.eval_shape(ClipText(config, FLOAT32).init_with_output, jax.random.key(0), tokens)
    assert embeddings.shape == (2, embedding_width)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_an_embedding_depends_on_its_own_text_up_to_the_end() -> None:
    tower = ClipText(CONFIG, FLOAT32)
    tokens = np.array([[17, 3, 4, END, 0, 0, 0], [17, 5, 6, 7, 8, 9, END], [17, END, 2, 3, END, 1, 1]], np.int32)
    params = random_params(tower, 0, tokens)
    apply = jax.jit(lambda tokens: tower.apply({"params": params}, tokens))
    expected = np.asarray(apply(tokens))
    ends = [3, 6, 1]
    for row, end in enumerate(ends):
        for position in range(tokens.shape[1]):
            changed = tokens.copy()
            changed[row, position] = 10
            others = np.arange(3) != row
            found = np.asarray(apply(changed))
            np.testing.assert_array_equal(found[others], expected[others])
            if position != end:
                assert np.allclose(found[row], expected[row], atol=1e-6) == (position > end)


def test_padding_does_not_matter() -> None:
    tower = ClipText(CONFIG, FLOAT32)
    tokens = np.array([[17, 3, 4, END], [17, END, 0, 0]], np.int32)
    params = random_params(tower, 0, tokens)
    apply = jax.jit(lambda tokens: tower.apply({"params": params}, tokens))
    expected = apply(tokens)
    for padding in (0, 11, END):
        padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=padding)
        np.testing.assert_allclose(apply(padded), expected, atol=1e-5)
