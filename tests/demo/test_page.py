from typing import Any

import pytest

from clipcap_jax.demo import page
from clipcap_jax.errors import UserError


def test_settings() -> None:
    assert page.checked({"n": 3, "beam_size": 2, "length_penalty": 0.7000001}) == {
        "n": 3,
        "beam_size": 3,
        "length_penalty": 0.7,
    }
    drawn = {"n": 1, "temperature": 1, "top_p": 0.35, "seed": None}
    assert page.checked(drawn) == drawn


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 11}, "Captions is 11: it has to be a number from 1 to 10"),
        ({"n": "3"}, "Captions is '3': it has to be a number from 1 to 10"),
        ({"length_penalty": float("nan")}, "Length penalty is nan: it has to be a number from 0 to 2"),
        ({"temperature": 0}, "Temperature is 0: it has to be a number from 0.1 to 2"),
    ],
)
def test_mistakes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        page.checked(given)
