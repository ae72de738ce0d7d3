import fcntl
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from clipcap_jax import files
from clipcap_jax.errors import UserError


def touch(folder: Path) -> None:
    (folder / "made").touch()


def test_the_first_place_that_has_it_or_can_be_written_to(tmp_path: Path) -> None:
    first, second, file = tmp_path / "a" / "b", tmp_path / "c", tmp_path / "file"
    file.write_text("where no folder can be made")
    assert files.once("name", [file, second], touch) == second / "name"
    assert files.once("name", [first, second], touch) == second / "name"
    assert files.once("other", [first, second], touch) == first / "other"
    assert [path.name for path in (first / "other").iterdir()] == ["made"]
    strangers = MagicMock()  # another user's folder, which may not be looked into
    (strangers / "name").is_dir.side_effect = PermissionError
    strangers.mkdir.side_effect = PermissionError
    assert files.once("name", [strangers, second], touch) == second / "name"
    with pytest.raises(UserError, match=r"nothing can be written to .*file: set XDG_CACHE_HOME"):
        files.once("name", [file], touch)


@pytest.mark.parametrize("error", [UserError("mine"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        touch(folder)
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        files.once("name", [tmp_path], fail)
    assert [path.name for path in tmp_path.iterdir()] == [".name.lock"]


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.home() == Path("/elsewhere/clipcap_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.home() == Path.home() / ".cache" / "clipcap_jax"


def make_slowly(home: Path, locks: bool) -> str:
    """Make a folder when two processes have asked for it; returns how often this one made it, and what it got."""

    def write(folder: Path) -> None:
        made.append(folder)
        if not locks:
            meet("writing")  # both are
        (folder / "by").write_text(str(os.getpid()))

    def meet(where: str) -> None:
        (home / f"{where}-{os.getpid()}").touch()
        while len(list(home.glob(f"{where}-*"))) < 2:
            pass

    made: list[Path] = []
    if not locks:
        fcntl.flock = refuse
    meet("asking")
    by = (files.once("name", [home], write) / "by").read_text()
    return f"{len(made)} {by}"


def refuse(*arguments: Any) -> None:
    raise OSError("no locks here")


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once(tmp_path: Path, locks: bool) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(make_slowly, 2 * [tmp_path], 2 * [locks]))
    times, by = zip(*(each.split() for each in found), strict=True)
    assert sorted(times) == (["0", "1"] if locks else ["1", "1"])
    assert len(set(by)) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_json_holds_neither_nan_nor_halves_of_characters() -> None:
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [inf, (1.5, -inf)], "c": {"ph\udcff é": [None, True, 3]}}
    written = files.to_json(value).encode()  # as every file is
    content = json.loads(written, parse_constant=pytest.fail)
    assert content == {"a": None, "b": [None, [1.5, None]], "c": {"ph\udcff é": [None, True, 3]}}
    assert "é".encode() in written


def test_names_that_are_no_utf8() -> None:
    files.check_utf8(Path("photos/é 木"))
    with pytest.raises(UserError, match=r"ph\udcff: this name is no UTF-8"):
        files.check_utf8("ph\udcff")


def test_what_is_there_is_replaced_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("")
    files.check_new(new, overwrite=False)
    files.check_new(there, new, overwrite=True)
    for paths, message in (
        ([new, there], "there is there already: name another file, or replace it with --overwrite"),
        ([tmp_path], "is a folder: name another file"),
        ([tmp_path / ("n" * 300)], "cannot be written: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            files.check_new(*paths, overwrite=False)
