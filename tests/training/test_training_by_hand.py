"""What a run logs and saves, against its config: three steps of an epoch and two of the next, computed by hand.

From the package come the model, `training_order` and the kind of dropout's keys alone, which have tests of their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import mean_loss, taught, tokenizer_with_a_word_at_0
from tiny import assert_close, make_config, named, saved, train

from clipcap_jax.config import Config, OptimizerConfig
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.inputs.batches import training_order
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training.step import dropout_key

DEVICES, PER_EPOCH, STEPS = 4, 3, 5  # 33 captions in batches of 12
RATES = [0, 1 / 2, 1, 2 / 3, 1 / 3]  # of the highest, which two steps warm up to
CASES: dict[str, dict[str, Any]] = {
    "smoothed, averages": {"train.seed": 3, "train.label_smoothing": 0.3, "optimizer.average_decay": 0.6},
    "the original's targets, GPT-2 frozen": {
        "train.seed": 5,
        "train.label_smoothing": 0.0,
        "train.targets": "original",
        "train.trainable": ("mapper",),
        "model.mapper.dropout": 0.2,
        "data.max_tokens": 6,  # some are cut
    },
}


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: config.learning_rate * jnp.array(RATES)[step],
            config.beta1,
            config.beta2,
            config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params),
        ),
    )


Share = tuple[np.ndarray, np.ndarray, np.ndarray]  # embeddings, tokens, and which of these are learnt


def batches(config: Config, tokenizer: Tokenizer) -> Iterator[list[Share]]:
    """What each device gets of every step."""
    longest, targets = config.data.max_tokens, config.train.targets
    pairs = [
        (example.embedding, taught(text, tokenizer, longest, targets))
        for example in open_split(config.data.name, "train", config.data.data_dir)
        for text in example.captions
    ]
    lengths, size = np.array([len(ids) for _, ids in pairs]), config.train.batch_size
    orders = [training_order(lengths, size, config.data.pool_batches, config.train.seed, epoch) for epoch in (0, 1)]
    for rows in np.concatenate(orders)[:STEPS]:
        shares = []
        for share in np.split(rows, DEVICES):
            tokens, learnt = np.zeros((2, len(share), longest), int)
            for i, row in enumerate(share):
                ids = pairs[row][1] if row >= 0 else []  # -1: nothing, as the epoch has no more
                tokens[i, : len(ids)] = ids
                learnt[i, : len(ids)] = [token != 0 or targets == "all" for token in ids]
            shares.append((np.stack([pairs[row][0] for row in share]), tokens, learnt))
        yield shares


def train_by_hand(config: Config, tokenizer: Tokenizer) -> tuple[list[dict[str, float]], Any, Any]:
    """The lines of the log, the parameters after the last step, and their average over the steps."""
    model, settings, average_decay = ClipCap(config.model), config.train, config.optimizer.average_decay

    def loss_sum(trained: Any, frozen: Any, embeddings: Any, tokens: Any, learnt: Any, key: Any) -> jax.Array:
        params, rngs = {**frozen, **trained}, {"dropout": dropout_key(key)}
        logits = model.apply({"params": params}, embeddings, tokens, dropout=settings.trainable, rngs=rngs)
        targets = optax.smooth_labels(jax.nn.one_hot(tokens, logits.shape[-1]), settings.label_smoothing)
        return jnp.where(learnt, optax.softmax_cross_entropy(logits, targets), 0).sum()

    optimizer = adamw(config.optimizer)
    gradient, update, init = (jax.jit(f) for f in (jax.value_and_grad(loss_sum), optimizer.update, model.init))
    params = init(jax.random.key(settings.seed), np.zeros((1, 5)), np.zeros((1, 2), int))["params"]
    frozen = {name: part for name, part in params.items() if name not in settings.trainable}
    params = average = {name: part for name, part in params.items() if name in settings.trainable}
    state, lines = optimizer.init(params), []
    for step, shares in enumerate(batches(config, tokenizer)):
        total: Any = (0.0, jax.tree.map(np.zeros_like, params))
        for device, share in enumerate(shares):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), step), device)
            total = jax.tree.map(np.add, total, gradient(params, frozen, *share, key))
        loss, grads = optax.tree.scale(1 / sum(learnt.sum() for _, _, learnt in shares), total)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, max(1 - average_decay, 3 / (step + 3)))
        rate, norm = RATES[step] * config.optimizer.learning_rate, optax.tree.norm(grads)
        lines.append({"train/loss": float(loss), "train/gradient_norm": float(norm), "train/learning_rate": rate})
    return lines, {**frozen, **params}, {**frozen, **average}


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_what_its_config_says(case: str, data_dir: Path, tmp_path: Path) -> None:
    train_split, val = (open_split("records/both", split, str(data_dir)) for split in ("train", "val"))
    texts = [text for example in train_split for text in example.captions]
    tokenizer = tokenizer_with_a_word_at_0(texts, 320)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_dict()["tokenizer_json"])
    changes = {
        "tokenizer.source": str(tmp_path),
        "train.epochs": STEPS / PER_EPOCH,
        "train.batch_size": 12,
        # Or Adam would blow up the rounding errors of gradients that would be 0 without them.
        "optimizer.epsilon": 1e-3,
        "evaluate.images": 5,
        "checkpoint.every": STEPS,
        **CASES[case],
    }
    config = make_config(data_dir, changes)
    train(tmp_path / "run", config)
    lines, last, average = train_by_hand(config, tokenizer)

    *steps, validation = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step.pop("step") for step in steps] == [*range(1, STEPS + 1)]
    for step, expected in zip(steps, lines, strict=True):
        del step["train/pairs_per_second"]
        assert step == pytest.approx(expected, rel=1e-5)
    assert max(line["train/gradient_norm"] for line in lines) > config.optimizer.clip_norm

    best = average if config.optimizer.average_decay else last
    found = saved(tmp_path / "run", STEPS)
    assert_close({name: leaf for name, leaf in found.items() if name.startswith("params.")}, named({"params": best}))
    permuted = {i: (i + len(val) // 2) % len(val) for i in range(len(val))}
    for name, shown in (("val/loss", None), ("val/loss_permuted", permuted)):
        assert validation[name] == pytest.approx(mean_loss(config, best, tokenizer, val, shown), rel=1e-5)
