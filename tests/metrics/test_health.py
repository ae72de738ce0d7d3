import pytest

from clipcap_jax.metrics.health import health


def test_counts() -> None:
    found = health(["A dog runs.", "a dog runs", "", "a cat"], [True, True, False, True])
    assert found == {
        "captions": 4,
        "distinct captions": 3,  # the first two differ in punctuation alone
        "empty captions": 1,
        "distinct words": 4,
        "words per caption": pytest.approx(8 / 4),
        "unfinished captions": 1,
    }


def test_what_is_not_known_is_not_told() -> None:
    assert "unfinished captions" not in health(["a dog"])
