from pathlib import Path

import needs
import pytest


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(needs.HOW, "no_such_module", "luck")
    return "no_such_module"


def test_what_is_not_there_skips_a_test(absent: str) -> None:
    needs.skip_without()
    with pytest.raises(pytest.skip.Exception, match="needs no_such_module: luck"):
        needs.skip_without(absent)


def test_java_is_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert needs.lacks("java")
    (tmp_path / "java").touch(0o755)
    assert not needs.lacks("java")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("no_such_module", "names no_such_module, which is not there: it takes luck"),
        ("java no_such_module", "names no_such_module, which is not there"),
        ("jav", "names 'jav', which is none of apache_beam, "),
    ],
)
def test_nothing_is_tested_without_what_is_expected(
    expected: str,
    message: str,
    absent: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the hook with which pytest begins."""
    (tmp_path / "java").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    assert conftest
    monkeypatch.setenv("CLIPCAP_EXPECT", "java")
    conftest.pytest_configure()
    monkeypatch.setenv("CLIPCAP_EXPECT", expected)
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure()
