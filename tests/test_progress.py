import io
import re
import time
from pathlib import Path

import pytest

from clipcap_jax import progress


def test_how_many_of_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("abc"), "Preparing", total=10, done=7)) == ["a", "b", "c"]
    assert re.match(r"Preparing ━+ 10/10 0:00:\d\d left", capsys.readouterr().out)
    with progress.bar() as bar:
        bar.advance(bar.add_task("Unpacking", total=4), 3)
    assert re.match(r"Unpacking .+ 3/4 ", capsys.readouterr().out)


def test_what_takes_long_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.told("Looking"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    with progress.told("Looking"):
        while not (shown := capsys.readouterr()).err:
            time.sleep(0.01)
        assert shown == ("", "Looking ...\n")
    assert re.fullmatch(r"Looking: \d+ s\n", capsys.readouterr().err)
    with pytest.raises(ValueError, match="wrong"), progress.told("Looking"):
        raise ValueError("wrong")
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


NAME = "runs/lr[lr=1e-4]/[/x]:smile:"  # rich's markup would lose a part of it, and raise an error at the rest


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.screen(file=io.StringIO(), width=60)
    shown.print(NAME)
    shown.rule(NAME)
    assert list(progress.track(iter("abc"), NAME, total=3, console=shown)) == ["a", "b", "c"]
    assert list(progress.track(iter("abc"), NAME, total=3)) == ["a", "b", "c"]
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().count(NAME) == 3
    assert NAME in capsys.readouterr().out


def test_every_console_is_such_a_one() -> None:
    root = Path(__file__).parents[1]
    files = [*(root / "clipcap_jax").rglob("*.py"), root / "train.py", root / "evaluate.py"]
    made = re.compile(r"\bConsole\(|\bProgress\((?!\))|rich\.print\(|from_markup|(?<![\w.])print\(|\.status\(f?[\"']")
    found = {str(file.relative_to(root)): made.findall(file.read_text()) for file in files}
    del found["clipcap_jax/progress.py"]
    # Bars with columns of their own, which show no markup either; and a docstring for people's own Python.
    assert {name: calls for name, calls in found.items() if calls} == {
        "clipcap_jax/datasets/downloads.py": ["Progress("],
        "clipcap_jax/datasets/records.py": ["rich.print("],
        "clipcap_jax/metrics/spice.py": ["Progress("],
    }
