"""Tensors from weight files, without running anything that such a file may hold."""

import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_jax.convert.mapping import Arrays, some
from clipcap_jax.errors import UserError

# OpenAI's files, from the addresses in openai/CLIP, clip/clip.py. They are TorchScript archives: programs, which are
# loaded only if they are the ones that OpenAI published.
OPENAI_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}

# Under which names trainers put a state dict beside the rest of what they save: PyTorch Lightning and many others,
# PyTorch's own tutorials, fairseq and others, DeepSpeed.
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")
_NESTED = 4  # how deep; a pickle may hold a dict that holds itself
_EXPORT = 'Where it was written, save the weights alone: torch.save(model.state_dict(), "weights.pt")'


def read(path: Path) -> Arrays:
    """The tensors of a `.safetensors`, `.bin`, `.pt` or `.ckpt` file, or of a sharded one's `.index.json`.

    Of what a trainer saved, those of the model alone, without the names of data parallel (`module.`) and compiled
    (`_orig_mod.`) modules in theirs, or a `model.` before all of them.

    Raises:
      UserError: the file is not there, is truncated or broken, holds code or no state dict, or needs torch, which is
        not installed.
    """
    arrays: Arrays = {}
    for name, array in _read(path).items():
        if (bare := re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", name)) in arrays:
            raise UserError(f"{path} holds tensors with and without the prefix module. or _orig_mod.: {some([bare])}")
        arrays[bare] = array
    while arrays and all(name.startswith("model.") for name in arrays):
        arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    return arrays


def _read(path: Path) -> Arrays:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".json":
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return _read_torch(path)


def read_config(path: Path) -> dict[str, Any]:
    """What a `.json` file beside the weights says; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} does not hold settings by name")
    return stored


def _read_shards(index: Path) -> Arrays:
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{index} is not the index of a sharded model: it has no weight_map from tensors to files")
    arrays: Arrays = {}
    for shard in sorted(set(names.values())):
        if not re.fullmatch(r"[^/\\]+\.(safetensors|bin)", shard):  # an index may not lead out of its folder
            raise UserError(f"{index} names the file {shard!r:.80}, which is none of weights that lie beside it")
        for name, array in _read(index.with_name(shard)).items():
            if names.get(name) != shard:
                raise UserError(
                    f"{index.with_name(shard)} holds {some([name])}, which {index.name} does not place there"
                )
            arrays[name] = array
    return arrays


def read_safetensors(path: Path) -> Arrays:
    """The tensors of a `.safetensors` file, under their own names.

    Raises:
      UserError: it is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:  # the last of types that NumPy has not
        raise UserError(f"{path} is not a whole safetensors file: {error}. Copy or download it again.") from error


def _read_torch(path: Path) -> Arrays:
    data = path.read_bytes()
    if not data.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(f"{path} is not a file of PyTorch: it starts with {data[:16]!r}. Download it again.")
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path} is a file of PyTorch: pip install "clipcap_jax[torch]" to read it') from error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles unlike torch's own, which then turn out broken or refused
            if _is_torchscript(data):
                _check_published(path, data)
                state = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
            else:
                state = _load(data)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # Not torch's own words, which tell how to run it all the same.
        if asked := re.search(r"GLOBAL (\S+)|Can only .* got (.+)", str(error)):
            raise UserError(
                f"{path} holds more than tensors, {asked[1] or asked[2]:.200}, and was not loaded: it could run any "
                f"program. {_EXPORT}"
            ) from error
        raise UserError(f"{path} is not a whole file of PyTorch. Copy or download it again.") from error
    except Exception as error:  # on broken files torch raises nearly anything
        raise UserError(f"{path} is not a whole file of PyTorch: {error!r:.200}. Copy or download it again.") from error
    stored, place = _find_state_dict(state)
    if isinstance(stored, dict):
        other = [f"{_name(name)} ({_told(value)})" for name, value in stored.items() if not _is_plain(name, value)]
    else:
        other = [_told(stored)]
    if other:
        raise UserError(
            f"{path} does not hold a state dict, which is names and dense tensors and nothing else: {place} holds "
            f"{some(other)}. {_EXPORT}"
        )
    return {name: _to_numpy(value) for name, value in stored.items()}


def _name(name: Any) -> str:
    """Of an entry, for a message. Of values there is only the type: a small file may be lists of each other that no
    memory holds as a text."""
    return name if isinstance(name, str) else f"a {type(name).__name__}"


def _told(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {some(map(_name, value), 3)}" if isinstance(value, dict) and value else kind


class _Unread:
    """Stands for any object beside the tensors, such as a trainer's settings, whose class is not looked for."""

    def __new__(cls, *_: Any) -> "_Unread":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Forget what it is made of."""


def _load(data: bytes) -> Any:
    import torch

    unread = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)) if data.startswith(b"PK") else []
    with torch.serialization.safe_globals([(type(name, (_Unread,), {}), name) for name in unread]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _find_state_dict(stored: Any) -> tuple[Any, str]:
    """The state dict in what a trainer saved, and what to call the place where it is."""
    place = "it"
    for _ in range(_NESTED):
        found = [name for name in _STATE_DICTS if isinstance(stored, dict) and isinstance(stored.get(name), dict)]
        if not found:
            break
        stored, place = stored[found[0]], f"its {found[0]}"
    return stored, place


def _is_plain(name: Any, value: Any) -> bool:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    dense = value.layout == torch.strided and value.device.type == "cpu"
    # A small file may stand for a tensor that no memory holds, all of whose elements are one.
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _to_numpy(value: Any) -> np.ndarray:
    value = value.detach()
    return value.float().numpy() if value.is_floating_point() else value.numpy()


def _is_torchscript(data: bytes) -> bool:
    if not data.startswith(b"PK"):
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_published(path: Path, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found not in OPENAI_SHA256.values():
        raise UserError(
            f"{path} is a TorchScript archive, which is a program, and none of those that OpenAI published: its "
            f"SHA-256 is {found}. Download it again, or take the weights from the Hugging Face hub, such as "
            "timm/vit_base_patch32_clip_224.openai."
        )
