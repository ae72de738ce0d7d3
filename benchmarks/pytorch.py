"""Training and captioning with GPT-2 124M: clipcap_jax against PyTorch, in one run.

    python benchmarks/pytorch.py

Needs `pip install clipcap_jax[torch]`. Both sides have the same random weights, an MLP mapper (P=10, E=640, as in the
paper's tables) and transformers' GPT-2 or ours, and compute in float32. Ours is timed once compiled.

    training     steps of 40 pairs, 20 tokens a caption, with GPT-2 (dropout 0.1) and with the mapper alone; PyTorch as
                 the original's `train.py` has it, which forms GPT-2's gradients even where it is frozen, and without
    captioning   beams of 5, captions of 20 tokens; PyTorch as the original's `predict.py` has it, picture by picture,
                 reading everything again for each token, and transformers' `generate` with its cache, in batches

Both sides on the CPU: where JAX finds a GPU, JAX_PLATFORMS=cpu keeps it there.
"""

import argparse
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap_jax import optim, parallel
from clipcap_jax.convert import gpt2, original
from clipcap_jax.decode import DecodeConfig, beam_search
from clipcap_jax.models.clipcap import ClipCap, ClipCapConfig
from clipcap_jax.optim import OptimizerConfig
from clipcap_jax.step import TrainState, make_step

PREFIX, EMBEDDING, PAIRS, TOKENS, BEAMS, HEADS = 10, 640, 40, 20, 5, 12


class Captioner(nn.Module):
    """What the original's `ClipCaptionModel` with its `MLP` computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt2 = GPT2LMHeadModel(GPT2Config())
        width = self.gpt2.config.n_embd
        hidden = width * PREFIX // 2
        model = nn.Sequential(nn.Linear(EMBEDDING, hidden), nn.Tanh(), nn.Linear(hidden, width * PREFIX))
        self.mapper = nn.Sequential(OrderedDict(model=model))

    def prefix(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.mapper(inputs).unflatten(-1, (PREFIX, -1))

    def loss(self, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self.gpt2.transformer.wte(tokens)
        logits = self.gpt2(inputs_embeds=torch.cat([self.prefix(inputs), embedded], dim=1)).logits
        return nn.functional.cross_entropy(logits[:, PREFIX - 1 : -1].flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def search(self, inputs: torch.Tensor) -> torch.Tensor:
        """The best of BEAMS captions of one picture, all of TOKENS tokens."""
        prefix = self.prefix(inputs)  # 1 P D
        log_probs = self.gpt2(inputs_embeds=prefix).logits[0, -1].log_softmax(-1)
        totals, tokens = log_probs.topk(BEAMS)
        tokens = tokens[:, None]  # W t
        for _ in range(TOKENS - 1):
            embedded = torch.cat([prefix.expand(BEAMS, -1, -1), self.gpt2.transformer.wte(tokens)], dim=1)
            log_probs = totals[:, None] + self.gpt2(inputs_embeds=embedded).logits[:, -1].log_softmax(-1)
            totals, best = log_probs.flatten().topk(BEAMS)
            parents, new = best // log_probs.shape[1], best % log_probs.shape[1]
            tokens = torch.cat([tokens[parents], new[:, None]], dim=1)
        return tokens[totals.argmax()]

    def generate(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same for a batch, by transformers."""
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        return self.gpt2.generate(
            inputs_embeds=self.prefix(inputs), num_beams=BEAMS, do_sample=False, pad_token_id=0, **length
        )


def our_side(theirs: Captioner) -> tuple[ClipCap, dict[str, Any]]:
    def arrays(module: nn.Module) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in module.state_dict().items()}

    mapper, _, mapper_params = original.mapper_from_arrays(
        arrays(theirs.mapper), theirs.gpt2.config.n_embd, 0, "the benchmark"
    )
    sizes, gpt2_params = gpt2.from_arrays(arrays(theirs.gpt2), "the benchmark", HEADS)
    config = ClipCapConfig(None, mapper, sizes, False, dtype="float32", matmul_precision="highest")
    # Copies: the arrays are PyTorch's own memory, which its training changes.
    return ClipCap(config), jax.tree.map(np.array, {"mapper": mapper_params, "gpt2": gpt2_params})


def compare(title: str, ways: Mapping[str, Callable[[], object]], count: int, unit: str, repeats: int) -> None:
    """Print how many units a second each way does, a call of which does `count`."""
    best = dict.fromkeys(ways, float("inf"))
    for repeat in range(repeats + 1):  # in turn, so that what others do on the machine falls on all alike
        for way, work in ways.items():
            start = time.perf_counter()
            work()
            if repeat:  # the first time compiles
                best[way] = min(best[way], time.perf_counter() - start)
    print(f"{title}, best of {repeats}:")
    for way, taken in best.items():
        ratio = "" if way == "clipcap_jax" else f", {taken / best['clipcap_jax']:.2f} times our time"
        print(f"  {way:42} {count / taken:9.2f} {unit}/s{ratio}")


def torch_step(model: Captioner, parameters: list[Any], batch: dict[str, Any]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, eps=1e-6)
    inputs = torch.from_numpy(batch["inputs"])
    tokens = torch.from_numpy(batch["tokens"]).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = model.loss(inputs, tokens)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(model: ClipCap, params: dict[str, Any], trainable: tuple[str, ...], batch: Any) -> Callable[[], float]:
    settings = OptimizerConfig(
        2e-5, warmup_steps=1, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-6, clip_norm=0.0, average_decay=0.0
    )
    optimizer = optim.optimizer(settings, 1_000_000)
    dropout = ("gpt2",) if "gpt2" in trainable else ()
    step = parallel.map_step(make_step(model, optimizer, dropout=dropout, label_smoothing=0.0, targets="all"))
    trained = {name: params[name] for name in trainable}
    frozen = parallel.replicate({name: params[name] for name in params if name not in trainable})
    key = jax.random.key_data(jax.random.key(0))
    start = TrainState(np.int32(0), key, trained, optimizer.init(trained))  # type: ignore[arg-type]
    state = parallel.replicate(start)

    def again() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return again


def training(repeats: int) -> None:
    theirs = Captioner()
    model, params = our_side(theirs)
    random = np.random.default_rng(0)
    batch = {
        "inputs": random.normal(size=(PAIRS, EMBEDDING)).astype(np.float32),
        "tokens": random.integers(0, 50257, (PAIRS, TOKENS), dtype=np.int32),
        "lengths": np.full(PAIRS, TOKENS, np.int32),
    }
    theirs.train()
    ways = {
        "clipcap_jax": our_step(model, params, ("mapper", "gpt2"), batch),
        "PyTorch, as the original": torch_step(theirs, list(theirs.parameters()), batch),
    }
    compare("Training the MLP mapper and GPT-2", ways, PAIRS, "pairs", repeats)

    theirs, frozen = Captioner().eval(), Captioner().eval()
    frozen.gpt2.requires_grad_(False)
    ways = {
        "clipcap_jax": our_step(model, params, ("mapper",), batch),
        "PyTorch, as the original": torch_step(theirs, list(theirs.mapper.parameters()), batch),
        "PyTorch, without GPT-2's gradients": torch_step(frozen, list(frozen.mapper.parameters()), batch),
    }
    losses = [step() for step in ways.values()]
    print(f"Without dropout, the losses of the first step differ by up to {max(losses) - min(losses):.0e}.")
    compare("Training the MLP mapper alone", ways, PAIRS, "pairs", repeats)


def captioning(pictures: int, repeats: int) -> None:
    theirs = Captioner().eval()
    model, params = our_side(theirs)
    inputs = np.random.default_rng(0).normal(size=(pictures, EMBEDDING)).astype(np.float32)
    torch_inputs = torch.from_numpy(inputs)
    decode = DecodeConfig(BEAMS, TOKENS, 1.0, "")
    search = jax.jit(lambda params, inputs: beam_search(model, params, inputs, decode, 50256).tokens[:, 0])
    params = parallel.replicate(params)

    def ours(inputs: np.ndarray) -> np.ndarray:
        return np.asarray(search(params, inputs))

    def original_beams() -> np.ndarray:
        return np.stack([theirs.search(one[None]).numpy() for one in torch_inputs])

    def generate() -> np.ndarray:
        return theirs.generate(torch_inputs).numpy()

    expected = original_beams()
    for way, found in {"clipcap_jax": ours(inputs), "generate": generate()}.items():
        print(f"{(found == expected).all(axis=1).sum()} of {pictures} captions of {way} are the original's.")
    ways = {
        "clipcap_jax": lambda: ours(inputs),
        "clipcap_jax, one at a time": lambda: [ours(one[None]) for one in inputs],
        "PyTorch, as the original, one at a time": original_beams,
        "PyTorch, transformers' generate": generate,
    }
    title = f"Captioning in batches of {pictures}, beams of {BEAMS}, {TOKENS} tokens"
    compare(title, ways, pictures, "captions", repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8, help="captioned at once")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of transformers and torch about each other
    training(arguments.repeats)
    captioning(arguments.pictures, arguments.repeats)


if __name__ == "__main__":
    main()
