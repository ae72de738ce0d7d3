"""Fifty steps of training, ours and the original's: the same weights, batches, optimiser and schedule.

The original's side is its models and its loop (`train.py`), written down again for this test in PyTorch, around
transformers' GPT-2 as there.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from pytorch import arrays, gpt2, import_torch
from tiny import make_config

from clipcap_jax import parallel
from clipcap_jax.config import ModelPart, OptimizerConfig
from clipcap_jax.convert import gpt2 as convert_gpt2
from clipcap_jax.convert import original
from clipcap_jax.models.clipcap import ClipCap, ClipCapConfig
from clipcap_jax.training import optim
from clipcap_jax.training.step import TrainState, make_step

STEPS, WARMUP, BATCH, LENGTH, PREFIX, CLIP, EMBEDDING, WIDTH, VOCAB = 50, 10, 8, 12, 4, 3, 32, 256, 500
LEARNING_RATE = 1e-3


def torch_mapper(kind: str) -> Any:
    """The original's `MLP` and `TransformerMapper`."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.to_queries = nn.Linear(WIDTH, WIDTH, bias=False)
            self.attn.to_keys_values = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
            self.attn.project = nn.Linear(WIDTH, WIDTH)
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            query = self.attn.to_queries(y).unflatten(-1, (8, -1)).transpose(1, 2)
            key, value = self.attn.to_keys_values(y).unflatten(-1, (2, 8, -1)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
            x = x + self.attn.project(y)
            return x + self.mlp.fc2(torch.relu(self.mlp.fc1(self.norm2(x))))

    class TransformerMapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(EMBEDDING, CLIP * WIDTH)
            self.prefix_const = nn.Parameter(torch.randn(PREFIX, WIDTH))
            self.transformer = nn.Module()
            self.transformer.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, embedding: Any) -> Any:
            x = self.linear(embedding).unflatten(-1, (CLIP, WIDTH))
            x = torch.cat([x, self.prefix_const.expand(len(x), PREFIX, WIDTH)], dim=1)
            for layer in self.transformer.layers:
                x = layer(x)
            return x[:, CLIP:]

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = PREFIX * WIDTH // 2
            self.model = nn.Sequential(nn.Linear(EMBEDDING, hidden), nn.Tanh(), nn.Linear(hidden, PREFIX * WIDTH))

        def forward(self, embedding: Any) -> Any:
            return self.model(embedding).unflatten(-1, (PREFIX, WIDTH))

    torch.manual_seed(0)
    return Mlp() if kind == "mlp" else TransformerMapper()


def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        lengths = random.integers(1, LENGTH + 1, BATCH).astype(np.int32)
        tokens = random.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)  # 0 among them, which is not learnt
        tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
        inputs = random.normal(size=(BATCH, EMBEDDING)).astype(np.float32)
        found.append({"inputs": inputs, "tokens": tokens, "lengths": lengths})
    return found


def torch_losses(mapper: Any, language_model: Any, parameters: Any) -> list[float]:
    """The loop of the original's `train`, and its loss."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, eps=1e-6)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for batch in batches():
        tokens, inputs = (torch.from_numpy(batch[name]) for name in ("tokens", "inputs"))
        embedded = language_model.transformer.wte(tokens.long())
        output = language_model(inputs_embeds=torch.cat([mapper(inputs), embedded], dim=1))
        logits = output.logits[:, PREFIX - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens.long().flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def our_losses(config: ClipCapConfig, params: dict[str, Any], trainable: tuple[ModelPart, ...]) -> list[float]:
    settings = OptimizerConfig(
        LEARNING_RATE, WARMUP, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-6, clip_norm=0.0, average_decay=0.0
    )
    optimizer = optim.optimizer(settings, STEPS)
    train = dataclasses.replace(make_config(Path()).train, trainable=trainable, label_smoothing=0.0, targets="original")
    step = parallel.map_step(make_step(ClipCap(config), optimizer, optim.schedule(settings, STEPS), train))
    trained = {name: params[name] for name in trainable}
    frozen = {name: params[name] for name in params if name not in trainable}
    state, frozen = parallel.replicate(
        (TrainState(np.int32(0), trained, None, optimizer.init(trained)), frozen)  # type: ignore[arg-type]
    )
    losses = []
    for batch in batches():
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(("kind", "trainable"), [("mlp", ("mapper", "gpt2")), ("transformer", ("mapper",))])
def test_fifty_steps(kind: Literal["mlp", "transformer"], trainable: tuple[ModelPart, ...]) -> None:
    import_torch()
    language_model = gpt2(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=4, n_head=4, scale=0.02)
    mapper = torch_mapper(kind)
    ours, _, mapper_params = original.mapper_from_arrays(arrays(mapper), WIDTH, 8, "a test")
    sizes, gpt2_params = convert_gpt2.from_arrays(arrays(language_model), "a test", 4)
    sizes = dataclasses.replace(sizes, dropout=0.0)  # as torch here has none
    config = ClipCapConfig(None, ours, sizes, False, dtype="float32", matmul_precision="highest")
    # Copies: the arrays are torch's own memory, which its training changes.
    params = jax.tree.map(np.array, {"mapper": mapper_params, "gpt2": gpt2_params})

    parameters = [*mapper.parameters(), *(language_model.parameters() if "gpt2" in trainable else ())]
    before = [array.copy() for array in arrays(mapper).values()]
    expected = torch_losses(mapper, language_model, parameters)
    losses = our_losses(config, params, trainable)
    moved = [np.abs(now - then).max() for now, then in zip(arrays(mapper).values(), before, strict=True)]
    assert min(moved) > 0.1 * LEARNING_RATE * STEPS / 2
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
