import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from random_models import random_tokens

from clipcap_jax.models import transformer
from clipcap_jax.training.loss import caption_loss

SETTINGS = cases.Settings(seconds=0.01, dtype="bfloat16", tiny=True, commit="")
LENGTHS = jnp.array([5, 2, 0])
TOKENS = jnp.asarray(random_tokens(0, 3, 5))


def text_of(kind: str, change: variants.Change) -> str:
    case = cases.training_case("a test", SETTINGS, kind, 8, change=change)
    assert case.lower
    return str(case.lower().as_text())


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_every_variant_is_another_program(kind: str) -> None:
    forms = {
        name: text_of(kind, change)
        for name, change in variants.VARIANTS[kind].items()
        if "cuDNN" not in name  # which is traced on GPUs alone
    }
    assert len(set(forms.values())) == len(forms)
    assert text_of(kind, variants.VARIANTS[kind]["as it is"]) == forms["as it is"]  # nothing stays changed


@pytest.mark.parametrize("loss", [variants.logsumexp_loss, variants.own_gradient_loss])
def test_losses(loss: object) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (3, 5, 11)), jnp.float32)

    def both(function: object) -> object:
        return jax.value_and_grad(lambda logits: function(logits, TOKENS, LENGTHS)[0])(logits)  # type: ignore[operator]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both(loss), both(caption_loss))


def test_gradients_of_the_logits() -> None:
    random = np.random.default_rng(0)
    hidden, weights = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 3, 4), (5, 4)))

    def gradients(logits: object) -> object:
        return jax.grad(lambda *arguments: jnp.sin(logits(*arguments)).sum(), argnums=(0, 1))(hidden, weights)  # type: ignore[operator]

    expected = gradients(lambda hidden, weights: jnp.einsum("...d,vd->...v", hidden, weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), gradients(variants.logits_of), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_the_library(causal: bool) -> None:
    query, keys, values = (
        jnp.asarray(np.random.default_rng(i).normal(size=(2, 5, 3, 4)), jnp.float32) for i in range(3)
    )
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None] if causal else None
    expected = transformer.attention(query, keys, values, mask, lambda weights: weights)
    found = variants.library_attention("xla")(query, keys, values, mask, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
