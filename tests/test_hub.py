import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from clipcap_jax import hub
from clipcap_jax.errors import UserError


def test_the_first_weights_of_a_folder_are_found(tmp_path: Path) -> None:
    names = ("open_clip_model.safetensors", "model.safetensors")
    with pytest.raises(UserError, match=r"holds none of open_clip_model\.safetensors, model\.safetensors"):
        hub.locate(str(tmp_path), names)
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
        assert hub.locate(str(tmp_path), names) == tmp_path / name
    assert hub.locate(str(tmp_path / "model.safetensors"), names) == tmp_path / "model.safetensors"
    assert hub.pinned(str(tmp_path), tmp_path / "model.safetensors") == str(tmp_path)


@pytest.mark.parametrize("name", ["last.ckpt", "model.pt", "model.bin", "model.safetensors", "./runs"])
def test_files_that_are_not_there_are_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no file or folder {name}$"):
        hub.locate(name, ("model.safetensors",))


def cached(tmp_path: Path, repository: str, *names: str) -> Path:
    """A copy of the hub's cache with one snapshot."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name in names:
        save_file({"weight": np.zeros(2, np.float32)}, snapshot / name)
    return snapshot


OFFLINE = """
import sys
from clipcap_jax import hub
from clipcap_jax.convert import clip
from clipcap_jax.errors import UserError
for source in sys.argv[1:]:
    try:
        print(path := hub.locate(source, clip.FILES), hub.pinned(source, path))
    except UserError as error:
        print(error)
"""


def locate_offline(tmp_path: Path, *sources: str) -> str:
    """What `locate` says in a process of its own, as the hub's client reads its settings when it is imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, *sources], capture_output=True, text=True, env=environment, check=True
    )
    return run.stdout


def test_what_the_hubs_cache_holds_is_found_offline(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "timm/vit.openai", "open_clip_model.safetensors", "model.safetensors")
    for name in hub.CONFIG_FILES:
        (snapshot / name).write_text("{}")
    commit = "0" * 40
    expected = f"{snapshot / 'open_clip_model.safetensors'} timm/vit.openai@{commit}\n"
    assert locate_offline(tmp_path, "timm/vit.openai", f"timm/vit.openai@{commit}") == 2 * expected


def test_what_the_hubs_cache_does_not_hold(tmp_path: Path) -> None:
    cached(tmp_path, "timm/vit.openai", "open_clip_model.safetensors")  # without its config
    said = locate_offline(tmp_path, "gpt2", f"timm/vit.openai@{'1' * 40}", "timm/vit.openai", "runs/no such folder")
    assert said.count("Offline, name a file or a folder.") == 3
    assert "there is no file or folder 'gpt2', and the Hugging Face hub did not give it: " in said
    assert "there is no file or folder 'runs/no such folder', and it is no name on the Hugging Face hub" in said


@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path: Path, server: str) -> None:
    with socket.create_server(("localhost", 0)) as listening:
        endpoint = f"http://localhost:{listening.getsockname()[1]}"
        if server == "refuses":
            listening.close()
        places = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", "from clipcap_jax import hub; hub._PATIENCE = 1.0;" + OFFLINE, "gpt2"]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        run = subprocess.run(command, capture_output=True, text=True, env=environment | places, check=True, timeout=60)
    reason = "Connection refused" if server == "refuses" else "(timed out|no answer within 1 seconds)"
    message = f"there is no file or folder 'gpt2', and the Hugging Face hub did not give it: .*{reason}\n"
    assert re.fullmatch(message + r"Offline, name a file or a folder\.\n", run.stdout)
    assert not run.stderr  # of retries, above all


@pytest.mark.parametrize("asked", ["", "v1"])
def test_what_belongs_to_weights_is_of_their_commit(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch may move between one file and the next."""
    commit = "0" * 40
    snapshot = tmp_path / "snapshots" / commit
    fetched: dict[str, Any] = {}

    def fetch(name: str, file: str, *, revision: str | None, local_files_only: bool) -> str:
        fetched[file] = revision
        return str(snapshot / file)

    def fetch_all(name: str, *, revision: str, allow_patterns: list[str], local_files_only: bool) -> None:
        fetched[allow_patterns[0]] = revision

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch_all)
    index = "model.safetensors.index.json"
    assert hub.locate(f"owner/name@{asked}" if asked else "owner/name", (index,)) == snapshot / index
    assert fetched == {
        index: asked or None,
        **dict.fromkeys(hub.CONFIG_FILES, commit),
        "model-*.safetensors": commit,
    }
