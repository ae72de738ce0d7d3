import cases
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import variants

from clipcap_jax.models import transformer

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
SETTINGS = cases.Settings(seconds=0.01, dtype="bfloat16", tiny=True, commit="")


def text_of(case: cases.Case) -> str:
    assert case.lower
    return str(case.lower().as_text()) + str(case.options)


@pytest.mark.parametrize("kind", variants.VARIANTS)
def test_every_variant_is_another_program(kind: str) -> None:
    found = [case for case in cases.variants(SETTINGS) if case.name.split("/")[1] == kind]
    forms = {case.name: text_of(case) for case in found if "cuDNN" not in case.name}  # which is traced on GPUs alone
    assert len(set(forms.values())) == len(forms)
    assert text_of(found[0]) == forms[f"variants/{kind}/as it is"]  # nothing stays changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["search", "tower"])
def test_a_variant_computes_the_same(kind: str) -> None:
    settings = SETTINGS._replace(dtype="float32")
    found = [case for case in cases.variants(settings) if case.name.split("/")[1] == kind and not case.options]
    arguments = {
        "search": lambda: (cases.random_params(cases.captioner(settings, "mlp")), programs.random_embeddings(2)),
        "tower": lambda: (programs.random_params(programs.tower_shapes(programs.TOWERS["tiny ViT"])), PIXELS),
    }[kind]()
    base, *others = (
        jax.tree.leaves(case.lower().compile()(*arguments)) for case in found if case.lower and "cuDNN" not in case.name
    )
    for other in others:
        for expected, leaf in zip(base, other, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_the_library(causal: bool) -> None:
    query, keys, values = (
        jnp.asarray(np.random.default_rng(i).normal(size=(2, 3, 5, 4)), jnp.float32) for i in range(3)
    )
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None] if causal else None
    expected = transformer.attention(query, keys, values, mask, lambda weights: weights)
    found = variants.library_attention("xla")(query, keys, values, mask, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
