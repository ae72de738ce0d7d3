import argparse
import json
import pickle
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Evil
from pytorch import import_torch
from safetensors.numpy import save_file

from clipcap_jax.convert import weights
from clipcap_jax.convert.mapping import Arrays
from clipcap_jax.errors import UserError

ARRAYS: Arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array([1.5, -2], np.float16)}


@pytest.fixture
def torch() -> Any:
    return import_torch()


class Touch:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


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
        ("[" * 100_000, "is not JSON"),
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
    torch.save({"state_dict": {"a": torch.ones(1)}, "evil": Evil(mark)}, tmp_path / "last.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    for name in ("model.pt", "last.ckpt", "plain.pt"):
        with pytest.raises(UserError) as raised:
            weights.read(tmp_path / name)
        assert "holds more than tensors, posix.mkdir, and was not loaded: it could run any program" in str(raised.value)
        assert "weights_only" not in str(raised.value)  # torch's advice is to run it all the same
    assert not mark.exists()


def test_code_that_torch_would_allow_does_not_run_either(torch: Any, tmp_path: Path) -> None:
    """Of modules other than os and sys."""
    mark, allowed = tmp_path / "mark", set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": {"a": torch.ones(2)}, "evil": Touch(mark)}, tmp_path / "last.ckpt")
    assert_same(weights.read(tmp_path / "last.ckpt"), {"a": np.ones(2, np.float32)})
    torch.save({"a": torch.ones(2), "evil": Touch(mark)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"it holds evil \(builtins\.eval\)"):
        weights.read(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == allowed
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds list"),
        ({"a": 3, 4: 5}, r"it holds a \(int\), a int \(int\)\. Where it was written, save the weights alone"),
        ({"model": {"nested": "dict"}}, r"its model holds nested \(str\)"),
        ({"net": {"a.weight": 1, "a.bias": 2}, "epoch": 3}, r"holds net \(dict of a\.weight, a\.bias\), epoch \(int\)"),
        (
            {f"{i:02}" * 100: i for i in range(20)},
            r"it holds (\d{80}, ){10}\.\.\. Where|it holds (\d{80}, ){10}\.\.\.\. Where",
        ),
    ],
)
def test_a_torch_file_without_a_state_dict(torch: Any, tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"does not hold a state dict, .*{message}"):
        weights.read(tmp_path / "model.pt")


def test_a_small_torch_file_that_stands_for_a_large_text(torch: Any, tmp_path: Path) -> None:
    """Or that has no end: 2 ** 60 brackets, and a dict that holds itself."""
    bomb: Any = 1
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"a": bomb}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"it holds a \(list\)"):
        weights.read(tmp_path / "model.pt")
    own: dict[str, Any] = {}
    own["model"] = own
    torch.save(own, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"its model holds model \(dict of model\)"):
        weights.read(tmp_path / "model.pt")


class Settings:
    """A class that only the program knows that saved it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __getstate__(self) -> Any:
        return [1, 2]  # no dict

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("it was run")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 1, "hyper_parameters": {"width": 3}, "optimizer_states": [{}]},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "loss": 0.5},
        lambda state: {"model": state, "scheduler": None},
        lambda state: {"module": state, "global_step": 7},
        lambda state: {"model": {"module": {"state_dict": state}}},
        lambda state: {"model": "a name", "state_dict": {"model": state, "epoch": 1}},
        lambda state: {"state_dict": state, "hyper_parameters": argparse.Namespace(width=3, path=Path("a"))},
        lambda state: {"state_dict": state, "hyper_parameters": Settings(Path("a")), "callbacks": {Settings: print}},
    ],
)
@pytest.mark.parametrize(
    "prefixes",
    ["", "module.", "model.", "_orig_mod.", "model.module._orig_mod.", "_orig_mod.module.model.model.module."],
)
def test_what_trainers_wrap(torch: Any, tmp_path: Path, wrap: Any, prefixes: str) -> None:
    state = {prefixes + name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(wrap(state), tmp_path / "last.ckpt")
    assert_same(weights.read(tmp_path / "last.ckpt"))


def test_wrappers_within_names(tmp_path: Path) -> None:
    save_file(
        {"gpt._orig_mod.a.weight": ARRAYS["a.weight"], "gpt.module.a.bias": ARRAYS["a.bias"]},
        tmp_path / "1.safetensors",
    )
    assert weights.read(tmp_path / "1.safetensors").keys() == {"gpt.a.weight", "gpt.a.bias"}
    others = {"submodule.a": ARRAYS["a.bias"], "model.a": ARRAYS["a.bias"], "a.model.b": ARRAYS["a.bias"]}
    save_file(others, tmp_path / "2.safetensors")
    assert_same(weights.read(tmp_path / "2.safetensors"), others)
    save_file({"module.a": ARRAYS["a.bias"], "a": ARRAYS["a.bias"]}, tmp_path / "3.safetensors")
    with pytest.raises(UserError, match=r"holds tensors with and without the prefix module\. or _orig_mod\.: a$"):
        weights.read(tmp_path / "3.safetensors")


def test_shards_of_what_is_wrapped(tmp_path: Path) -> None:
    save_file({f"module.{name}": array for name, array in ARRAYS.items()}, tmp_path / "1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"module.{name}": "1.safetensors" for name in ARRAYS}}))
    assert_same(weights.read(index))


def test_whole_models_are_not_loaded(torch: Any, tmp_path: Path) -> None:
    torch.save(Settings(tmp_path), tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"it holds test_weights\.Settings\. Where it was written, save the weights alone"
    ):
        weights.read(tmp_path / "model.pt")
    torch.save({"state_dict": {}, "counts": defaultdict(int, a=1)}, tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"holds more than tensors, .*defaultdict.*, and was not loaded: .* save the weigh"
    ):
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
