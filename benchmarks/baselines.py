"""PyTorch's side of the benchmarks: the original's captioner, and CLIP's towers, under the names of their weights.

Needs torch and transformers. The captioner computes what `ClipCaptionModel` and `ClipCaptionPrefix` of the original's
`train.py` compute, and searches as its `predict.py` does, written anew.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel

from clipcap_jax.models.clip_resnet import ClipResnetConfig
from clipcap_jax.models.clip_vit import PIXEL_MEAN, PIXEL_STD, ClipVitConfig
from clipcap_jax.models.clipcap import ClipCapConfig


class MapperLayer(nn.Module):
    """`TransformerLayer` of the original, its parameters under the same names; `fused`: attention by PyTorch's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.fused = heads, False
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {
                "to_queries": nn.Linear(width, width, bias=False),
                "to_keys_values": nn.Linear(width, 2 * width, bias=False),
                "project": nn.Linear(width, width),
            }
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        query = self.attn["to_queries"](y).unflatten(-1, (self.heads, -1))  # B L H K
        key, value = self.attn["to_keys_values"](y).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if self.fused:
            y = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
            y = y.transpose(1, 2)
        else:
            scores = torch.einsum("blhk,bshk->bhls", query, key) * query.shape[-1] ** -0.5
            y = torch.einsum("bhls,bshk->blhk", scores.softmax(-1), value)
        x = x + self.attn["project"](y.flatten(-2))
        return x + self.mlp["fc2"](functional.relu(self.mlp["fc1"](self.norm2(x))))


class TransformerMapper(nn.Module):
    """C tokens made from the embedding and P constants in, the last P out."""

    def __init__(self, width: int, embedding: int, prefix: int, clip_length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.clip_length = clip_length
        self.linear = nn.Linear(embedding, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix, width))
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(MapperLayer(width, heads) for _ in range(layers))})

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        x = self.linear(embedding).unflatten(-1, (self.clip_length, -1))  # B C D
        x = torch.cat([x, self.prefix_const.expand(len(x), -1, -1)], dim=1)
        for layer in self.transformer["layers"]:
            x = layer(x)
        return x[:, self.clip_length :]  # B P D


class MlpMapper(nn.Module):
    def __init__(self, width: int, embedding: int, prefix: int) -> None:
        super().__init__()
        hidden = width * prefix // 2
        self.model = nn.Sequential(nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, width * prefix))
        self.prefix = prefix

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.model(embedding).unflatten(-1, (self.prefix, -1))  # B P D


class Captioner(nn.Module):
    """A captioner of the original, with the weights of one of ours."""

    def __init__(self, config: ClipCapConfig, arrays: Mapping[str, np.ndarray], embedding: int) -> None:
        super().__init__()
        sizes, mapper = config.gpt2, config.mapper
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), sizes.dropout)
        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=sizes.vocab_size,
                n_positions=sizes.positions,
                n_embd=sizes.width,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                bos_token_id=None,
                eos_token_id=None,
                **rates,
            )
        )
        self.clip_project: nn.Module = (
            MlpMapper(sizes.width, embedding, mapper.prefix_length)
            if mapper.kind == "mlp"
            else TransformerMapper(
                sizes.width, embedding, mapper.prefix_length, mapper.clip_length, mapper.layers, mapper.heads
            )
        )
        # Copies: the arrays are JAX's, or will be changed by training.
        loaded = self.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=False)
        if loaded.unexpected_keys or loaded.missing_keys != ["gpt.lm_head.weight"]:  # tied
            raise ValueError(f"the models' parameters differ: {loaded}")

    def loss(self, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """As the original has it: logits of all positions, padding, which is 0, computed but not learnt, and a mask,
        here of ones, as nothing that counts can see what is on its right."""
        prefix = self.clip_project(inputs)
        embeddings = torch.cat([prefix, self.gpt.transformer.wte(tokens)], dim=1)
        mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
        logits = self.gpt(inputs_embeds=embeddings, attention_mask=mask).logits
        logits = logits[:, prefix.shape[1] - 1 : -1]
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=0)

    def lean_loss(self, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The same, as ours: no mask, which padding on the right does not need, and logits of the caption alone."""
        prefix = self.clip_project(inputs)
        embeddings = torch.cat([prefix, self.gpt.transformer.wte(tokens[:, :-1])], dim=1)
        hidden = self.gpt.transformer(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = self.gpt.lm_head(hidden[:, prefix.shape[1] - 1 :])
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=0)

    @torch.no_grad()
    def search(self, inputs: torch.Tensor, beams: int, length: int) -> torch.Tensor:
        """`generate_beam`: the best caption of one picture, all of it read again for each token; none ends early."""
        prefix = self.clip_project(inputs)  # 1 P D
        log_probs = self.gpt(inputs_embeds=prefix).logits[0, -1].log_softmax(-1)
        totals, tokens = log_probs.topk(beams)
        tokens = tokens[:, None]  # W t
        for _ in range(length - 1):
            embedded = torch.cat([prefix.expand(beams, -1, -1), self.gpt.transformer.wte(tokens)], dim=1)
            log_probs = totals[:, None] + self.gpt(inputs_embeds=embedded).logits[:, -1].log_softmax(-1)
            totals, best = log_probs.flatten().topk(beams)
            parents, new = best // log_probs.shape[1], best % log_probs.shape[1]
            tokens = torch.cat([tokens[parents], new[:, None]], dim=1)
        return tokens[totals.argmax()]

    def generate(self, inputs: torch.Tensor, beams: int, length: int) -> torch.Tensor:
        """The same for a batch, by transformers' own search with its cache of keys and values."""
        lengths = {"max_new_tokens": length, "min_new_tokens": length}
        return self.gpt.generate(
            inputs_embeds=self.clip_project(inputs), num_beams=beams, do_sample=False, pad_token_id=0, **lengths
        )


def training_step(
    model: Captioner, batch: Mapping[str, np.ndarray], padded: int, *, trains_gpt2: bool, compiled: bool, autocast: bool
) -> Callable[[], Any]:
    """A step of the original's `train.py` on one batch.

    Args:
      model: on its device.
      batch: as `programs.random_batch` makes it; what is padded becomes 0, the original's padding.
      padded: to how many tokens.
      trains_gpt2: whether GPT-2 learns; otherwise the original still forms its gradients.
      compiled: not as the original, but by `torch.compile`, with AdamW and attention fused, logits of the captions only
        and no gradients for what is frozen.
      autocast: to bfloat16.

    Returns:
      What takes a step and returns the loss: a number, or where `compiled`, a tensor that nothing waits for.
    """
    device = next(model.parameters()).device
    model.train()
    if not trains_gpt2:
        model.gpt.eval()
        model.gpt.requires_grad_(not compiled)
    tokens = np.where(np.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None], batch["tokens"], 0)
    tokens = np.pad(tokens, ((0, 0), (0, padded - tokens.shape[1])))
    inputs, tokens = torch.from_numpy(batch["inputs"]).to(device), torch.from_numpy(tokens).long().to(device)
    trained = list((model if trains_gpt2 else model.clip_project).parameters())
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0, eps=1e-6, fused=compiled)
    for module in model.modules():
        if isinstance(module, MapperLayer):
            module.fused = compiled
    torch._dynamo.reset()  # or another size would be compiled for all sizes
    loss_of = torch.compile(model.lean_loss, dynamic=False) if compiled else model.loss

    def step() -> Any:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(inputs, tokens)
        loss.backward()
        optimizer.step()
        return loss.detach() if compiled else loss.item()

    return step


class Bottleneck(nn.Module):
    """A block of CLIP's ResNets; `stride` is that of average pools."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            named = {
                "-1": self.pool,
                "0": nn.Conv2d(channels, 4 * width, 1, bias=False),
                "1": nn.BatchNorm2d(4 * width),
            }
            self.downsample = nn.Sequential()
            for name, module in named.items():
                self.downsample.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.pool(functional.relu(self.bn2(self.conv2(y))))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class AttentionPool(nn.Module):
    def __init__(self, positions: int, width: int, heads: int, output: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)  # B I C
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        query, key, value = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B H I K
            for projection, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(functional.scaled_dot_product_attention(query, key, value)[:, :, 0].flatten(1))


class ResNet(nn.Module):
    """`ModifiedResNet` of openai/CLIP's `model.py`, its parameters under the same names."""

    def __init__(self, config: ClipResnetConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(config.blocks):
            layers = nn.Sequential()
            for block in range(blocks):
                layers.append(Bottleneck(channels, width * 2**stage, 2 if stage and not block else 1))
                channels = 4 * width * 2**stage
            self.add_module(f"layer{stage + 1}", layers)
        positions = (config.image_size // 32) ** 2 + 1
        self.attnpool = AttentionPool(positions, channels, config.heads, config.embedding_width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(pixels)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.avg_pool2d(functional.relu(self.bn3(self.conv3(x))), 2)
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.attnpool(x)


class Tower(nn.Module):
    """uint8 pixels to embeddings, by CLIP's own ResNet or transformers' vision transformer."""

    def __init__(self, config: ClipVitConfig | ClipResnetConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        if isinstance(config, ClipResnetConfig):
            self.model: nn.Module = ResNet(config)
            for name, parameter in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
                if "bn" in name or "downsample.1" in name:  # so that no norm is the identity
                    parameter.data += (0.1 * torch.rand_like(parameter.float())).to(parameter.dtype)
        else:
            self.model = CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=config.width,
                    intermediate_size=4 * config.width,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    image_size=config.image_size,
                    patch_size=config.patch_size,
                    projection_dim=config.embedding_width,
                )
            )
        self.eval()

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights, as `clipcap_jax.convert.clip.from_arrays` reads them."""
        return {name: value.numpy(force=True) for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `B H W 3` to `B E`."""
        dtype = next(self.parameters()).dtype
        mean, std = (torch.tensor(values, device=pixels.device) for values in (PIXEL_MEAN, PIXEL_STD))
        normalized = ((pixels / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)  # channels last in memory
        found = self.model(normalized)
        return found if isinstance(found, torch.Tensor) else found.image_embeds
