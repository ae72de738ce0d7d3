import numpy as np
import pytest

from clipcap_jax.captioning import duplicates
from clipcap_jax.captioning.duplicates import first_equals


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [4, 16, 4096])
def test_the_earliest_is_found(threshold: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever blocks all are compared."""
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(50, 4)) * random.uniform(0.1, 10, size=(50, 1))
    embeddings[[7, 30, 49]] = embeddings[5] * np.array([[1.0], [3.0], [0.5]])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = [
        next((j for j in range(i) if float(unit[i] @ unit[j]) >= threshold - 1e-6), -1) for i in range(len(unit))
    ]
    assert expected[49] <= 5
    found = first_equals(embeddings.astype(np.float16 if threshold < 1 else np.float32), threshold, disable=True)
    assert found.tolist() == expected
