import cases
import jax.numpy as jnp
import numpy as np
import pytest
import variants

from clipcap_jax.models import transformer

SETTINGS = cases.Settings(seconds=0.01, dtype="bfloat16", tiny=True, commit="")


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


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_the_library(causal: bool) -> None:
    query, keys, values = (
        jnp.asarray(np.random.default_rng(i).normal(size=(2, 3, 5, 4)), jnp.float32) for i in range(3)
    )
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None] if causal else None
    expected = transformer.attention(query, keys, values, mask, lambda weights: weights)
    found = variants.library_attention("xla")(query, keys, values, mask, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
