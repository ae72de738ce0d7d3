"""PyTorch's side of the comparisons: models of the reference libraries with random parameters that all matter."""

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest


def import_torch() -> Any:
    """torch, or the test is skipped; with one thread: several wait for each other by spinning, which takes longer than
    the work on cores that they share with JAX or another worker's tests."""
    needs.skip_without("torch")
    import torch

    torch.set_num_threads(1)
    return torch


def randomize(model: Any, seed: int, scale: float) -> Any:
    """The model, ready to be used, with noise on all its parameters and batch norms' statistics."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += scale * torch.randn(buffer.shape, generator=generator)
        if name.endswith("running_var"):
            buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return model.eval()


def gpt2(seed: int = 0, scale: float = 0.1, **sizes: Any) -> Any:
    """transformers' `GPT2LMHeadModel`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and torch about each other
        from transformers import GPT2Config, GPT2LMHeadModel

        return randomize(GPT2LMHeadModel(GPT2Config(**sizes)), seed, scale)


def clip_vision(seed: int = 0, scale: float = 0.05, **sizes: Any) -> Any:
    """transformers' `CLIPVisionModelWithProjection`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)), seed, scale)


def clip_text(seed: int = 0, scale: float = 0.05, **sizes: Any) -> Any:
    """transformers' `CLIPTextModelWithProjection`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        return randomize(CLIPTextModelWithProjection(CLIPTextConfig(**sizes)), seed, scale)


def whole_clip(vision: dict[str, Any], text: dict[str, Any], width: int, seed: int = 0, scale: float = 0.05) -> Any:
    """transformers' `CLIPModel`, with embeddings of this width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
        return randomize(CLIPModel(config), seed, scale)


def modified_resnet(seed: int = 0, scale: float = 0.02, **sizes: Any) -> Any:
    """open_clip's `ModifiedResNet`."""
    return randomize(_open_clip("modified_resnet").ModifiedResNet(**sizes), seed, scale)


def text_transformer(seed: int = 0, scale: float = 0.05, **sizes: Any) -> Any:
    """open_clip's `TextTransformer`, as OpenAI's CLIPs have it."""
    module = _open_clip("transformer")
    return randomize(module.TextTransformer(act_layer=module.QuickGELU, **sizes), seed, scale)


def _open_clip(module: str) -> Any:
    """A module of open_clip, without the rest of that package, which wants torchvision."""
    needs.skip_without("open_clip")
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations or [])
    names = {"torchvision": {}, "torchvision.ops": {}, "torchvision.ops.misc": {"FrozenBatchNorm2d": object}}
    stubs = {name: types.ModuleType(name) for name in names}
    for name, attributes in names.items():
        vars(stubs[name]).update(attributes)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in {**stubs, "open_clip": package}.items():
            patch.setitem(sys.modules, name, stub)
        found = importlib.import_module(f"open_clip.{module}")
        for name in [name for name in sys.modules if name.startswith("open_clip.")]:
            patch.delitem(sys.modules, name)
    return found


def arrays(model: Any) -> dict[str, np.ndarray]:
    """The state dict."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def save(state: dict[str, np.ndarray], path: Path, prefix: str = "") -> Path:
    """Write a state dict, each of its names with a prefix; returns the path."""
    torch = import_torch()
    torch.save({prefix + name: torch.from_numpy(np.array(value)) for name, value in state.items()}, path)
    return path
