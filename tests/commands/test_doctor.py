import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from tiny import Clipcap

from clipcap_jax.commands import doctor


def test_what_the_machine_has(
    clipcap: Clipcap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "clipcap_jax").mkdir()
    (tmp_path / "clipcap_jax" / "file").write_bytes(bytes(3 * 2**20))
    found = importlib.util.find_spec
    absent = ("torch", "gcsfs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert clipcap("doctor") == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"jax: {importlib.metadata.version('jax')}" in printed
    assert "Devices: 4 cpu devices" in printed
    assert f"Cache of clipcap_jax: {tmp_path / 'clipcap_jax'}, 3 MiB" in printed
    assert 'Extra torch, for the original\'s checkpoints: missing: pip install "clipcap_jax[torch]"' in printed
    assert any(line.startswith("METEOR: ") for line in printed)


def test_extras_are_those_of_the_package() -> None:
    extras = set(importlib.metadata.metadata("clipcap_jax").get_all("Provides-Extra") or [])
    assert extras == {*doctor._EXTRAS, "test", "docs", "dist"}  # the last are for who works on it
