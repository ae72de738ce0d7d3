import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Evil
from safetensors.numpy import save_file

from clipcap_jax.convert import weights
from clipcap_jax.convert.mapping import Arrays
from clipcap_jax.errors import UserError

ARRAYS: Arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array([1.5, -2], np.float16)}


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs the torch extra")


def assert_same(found: Arrays, expected: Arrays = ARRAYS) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_safetensors(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    assert_same(weights.read(tmp_path / "model.safetensors"))


def test_a_truncated_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is not a whole safetensors file: .* Copy or download it again"):
            weights.read(path)


def test_shards(tmp_path: Path) -> None:
    names = dict(zip(ARRAYS, ("model-1-of-2.safetensors", "model-2-of-2.safetensors"), strict=True))
    for name, shard in names.items():
        save_file({name: ARRAYS[name]}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert_same(weights.read(index))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no file .*model-2-of-2\.safetensors"):
        weights.read(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not JSON"),
        ("[]", "does not hold settings by name"),
        ("{}", "is not the index of a sharded model"),
        ('{"weight_map": 3}', "is not the index of a sharded model"),
        ('{"weight_map": {"a": 3}}', "is not the index of a sharded model"),
        ('{"weight_map": {"a": ""}}', "names the file '', which is none of weights that lie beside it"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"names the file '\.\./b\.safetensors', which is none"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "which is none of weights that lie beside it"),
    ],
)
def test_a_broken_index(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        weights.read(tmp_path / "model.safetensors.index.json")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("1.safetensors", "2.safetensors"):
        save_file(ARRAYS, tmp_path / shard)
    names = dict(zip(ARRAYS, ("1.safetensors", "2.safetensors"), strict=True))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"1\.safetensors holds a\.\w+, which model.* does not place there"):
        weights.read(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_state_dict_of_torch(torch: Any, tmp_path: Path, new_format: bool) -> None:
    state = {name: torch.from_numpy(array) for name, array in ARRAYS.items()} | {"steps": torch.tensor(7)}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=new_format)
    assert_same(weights.read(tmp_path / "model.pt"), {**ARRAYS, "steps": np.array(7)})


def test_code_in_a_torch_file_does_not_run(torch: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"a": torch.ones(1), "evil": Evil(mark)}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(UserError) as raised:
            weights.read(tmp_path / name)
        assert "holds more than tensors, posix.mkdir, and was not loaded: it could run any program" in str(raised.value)
        assert "weights_only" not in str(raised.value)  # torch's advice is to run it all the same
    assert not mark.exists()


def test_a_truncated_torch_file(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is not a whole file of PyTorch.*Copy or download it again"):
            weights.read(path)


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"."])
def test_no_torch_file_at_all(torch: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(UserError, match="is not a file of PyTorch: it starts with"):
        weights.read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "data", [b"\x80\x02)t.", b"\x80\x02K\x01K\x02\x86R.", b"PK\x03\x04 and no directory", b"\x80\x04"]
)
def test_broken_torch_files(torch: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(UserError, match="is not a whole file of PyTorch"):
        weights.read(tmp_path / "model.pt")


def test_what_trains_is_read_too(torch: Any, tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "model.pt")
    assert_same(weights.read(tmp_path / "model.pt"), {"a": np.ones(2, np.float32)})


def test_tensors_that_are_not_plain(torch: Any, tmp_path: Path) -> None:
    """A small file that stands for terabytes, and what has no elements to read."""
    for tensor in (torch.zeros(1).expand(1 << 40), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")):
        torch.save({"a": tensor}, tmp_path / "model.pt")
        with pytest.raises(UserError, match="does not hold a state dict, which is names and dense tensors"):
            weights.read(tmp_path / "model.pt")
    torch.save({3: torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="does not hold a state dict"):
        weights.read(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"model": {"nested": "dict"}}])
def test_a_torch_file_without_a_state_dict(torch: Any, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="does not hold a state dict"):
        weights.read(tmp_path / "model.pt")


def test_a_torchscript_archive_that_openai_did_not_publish(torch: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/code/__torch__.py", b"os.system('true')")
    with pytest.raises(UserError, match="TorchScript archive, which is a program, and none of those that OpenAI publi"):
        weights.read(tmp_path / "ViT-B-32.pt")


def test_a_torchscript_archive_that_was_published(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import warnings

    module = torch.nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(module).save(str(tmp_path / "linear.pt"))
        published = hashlib.sha256((tmp_path / "linear.pt").read_bytes()).hexdigest()
        monkeypatch.setitem(weights.OPENAI_SHA256, "a test", published)
        found = weights.read(tmp_path / "linear.pt")
    assert_same(found, {name: value.numpy() for name, value in module.state_dict().items()})


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r'is a file of PyTorch: pip install "clipcap_jax\[torch\]"'):
        weights.read(tmp_path / "model.pt")


def test_the_first_weights_of_a_folder_are_found(tmp_path: Path) -> None:
    names = ("open_clip_model.safetensors", "model.safetensors")
    with pytest.raises(UserError, match=r"holds none of open_clip_model\.safetensors, model\.safetensors"):
        weights.locate(str(tmp_path), names)
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
        assert weights.locate(str(tmp_path), names) == tmp_path / name
    assert weights.locate(str(tmp_path / "model.safetensors"), names) == tmp_path / "model.safetensors"
    assert weights.pinned(str(tmp_path), tmp_path / "model.safetensors") == str(tmp_path)


def cached(tmp_path: Path, repository: str, *names: str) -> Path:
    """A copy of the hub's cache with one snapshot."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name in names:
        save_file(ARRAYS, snapshot / name)
    return snapshot


OFFLINE = """
import sys
from clipcap_jax.convert import clip, weights
from clipcap_jax.errors import UserError
for source in sys.argv[1:]:
    try:
        print(path := weights.locate(source, clip.FILES), weights.pinned(source, path))
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
    for name in weights.CONFIG_FILES:
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
