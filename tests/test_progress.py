import re

import pytest

from clipcap_jax import progress


def test_how_many_of_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("abc"), "Preparing", total=10, done=7)) == ["a", "b", "c"]
    assert re.match(r"Preparing ━+ 10/10 0:00:\d\d left", capsys.readouterr().out)
    with progress.bar() as bar:
        bar.advance(bar.add_task("Unpacking", total=4), 3)
    assert re.match(r"Unpacking .+ 3/4 ", capsys.readouterr().out)
