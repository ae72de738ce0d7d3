"""What a run is made of: its data, model and optimiser, and the state that it begins or goes on with."""

import dataclasses
from collections import Counter
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from clipcap_jax import cluster, parallel
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.checkpoints.store import Checkpoints, Restored
from clipcap_jax.config import Config
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData, Pairs
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training import optim
from clipcap_jax.training.checks import (
    check_encoder,
    check_not_shorter,
    check_same_data,
    check_same_encoder,
    check_same_model,
)
from clipcap_jax.training.start import check_same_run, choose_tokenizer, load_pretrained
from clipcap_jax.training.step import Params, TrainState, init_params, param_shapes
from clipcap_jax.training.validation import Validator

_LOOKED_AT = 1000  # pictures, for what a tokenizer does not know


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays as it is while a run trains.

    Attributes:
      config: everything about it.
      data, pairs: what it learns from.
      metadata: what its checkpoints say about the model.
      layout: how its steps are spread over devices.
      model: the model.
      optimizer, schedule: of the trained parts, and the learning rate by step.
      frozen: the parts that a step reads and does not change, on the devices.
      validator: None where it does not validate.
      total: steps from its beginning to its end.
      start: steps that are taken already.
      losses: of the last of these, since the last line of the log.
    """

    config: Config
    data: CaptionData
    pairs: Pairs
    metadata: Metadata
    layout: parallel.Layout
    model: ClipCap
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    frozen: Params
    validator: Validator | None
    total: int
    start: int
    losses: list[float]


def open_run(config: Config, folder: Path, checkpoints: Checkpoints, console: Console) -> tuple[Run, TrainState]:
    """A new run, or one that goes on from its latest checkpoint, and its state, on the devices.

    Args:
      config: everything about it.
      folder: the run's.
      checkpoints: those in it.
      console: where it is told what the run is.

    Raises:
      UserError: the folder holds another run, the data set is not what it was, or parts do not fit together.
    """
    restored = _restore(config, folder, checkpoints, console)
    base, base_params = (restored.metadata, restored.params) if restored else _base(config)
    data = _open(config, "train")
    model, clip = ClipCap(config.model), config.model.clip
    width = data.embedding_width or clip.embedding_width  # type: ignore[union-attr]
    if clip is not None and width != clip.embedding_width:
        raise UserError(
            f"{data.name} holds embeddings of width {width}; config.model.clip makes them {clip.embedding_width} wide"
        )
    fresh = _begin_params(config, model, width) if base_params is None else None
    tokenizer = choose_tokenizer(config, base, data.captions)
    pairs = _pairs(config, data, tokenizer, console)
    if not len(pairs):
        raise UserError(f"{data.name} holds no captions to train on")
    total = optim.total_steps(config.train, len(pairs))
    if restored:
        check_same_data(restored, data, len(pairs))
        check_not_shorter(restored, config, total)
    elif base:
        check_same_encoder(config, data, base)
    same = dataclasses.replace(config.data, data_dir="", workers=0)
    cluster.check_same(
        "settings, data or checkpoints",
        f"{dataclasses.replace(config, data=same)} {data.fingerprint} {restored.step if restored else 0}",
    )
    validator = None
    if config.evaluate.images:
        val = _open(config, "val")
        validator = Validator(model, tokenizer, val, _pairs(config, val, tokenizer, console), config)
        for note in validator.notes:
            console.print(f"Warning: {note}", style="yellow", soft_wrap=True)

    pretrained = {} if restored else load_pretrained(config, console)
    params = fresh.result() if fresh else base_params
    assert params is not None
    if base_params and not restored:
        check_same_model(config, model, width, base_params)
    if not restored:
        params |= pretrained
        check_encoder(config, data, params, console)
        if cluster.count() > 1:  # each has read them by itself, and they would never meet
            cluster.check_same("weights to start from", str([np.sum(leaf) for leaf in jax.tree.leaves(params)]))
    if missing := set(config.train.trainable) - set(params):
        raise UserError(f"config.train.trainable names {', '.join(missing)}, which this model does not have")
    trained: Params = {name: part for name, part in params.items() if name in config.train.trainable}
    frozen = {name: part for name, part in params.items() if name not in config.train.trainable}
    checkpoints.save_frozen(jax.device_get(frozen))
    optimizer, layout = optim.optimizer(config.optimizer, total), parallel.LAYOUTS[config.parallel.layout]()
    if restored:
        state = TrainState(jnp.int32(restored.step), trained, restored.average, restored.optimizer)
        state = layout.place(state)
    else:
        trained = layout.place(trained)
        average = jax.tree.map(jnp.copy, trained) if config.optimizer.average_decay else None
        state = TrainState(layout.place(jnp.int32(0)), trained, average, layout.placed(optimizer.init)(trained))
    run = Run(
        config=config,
        data=data,
        pairs=pairs,
        metadata=Metadata(config, tokenizer, data.encoder or "", width),
        layout=layout,
        model=model,
        optimizer=optimizer,
        schedule=optim.schedule(config.optimizer, total),
        # A tower beside stored embeddings is not read: it stays where it is.
        frozen=layout.place(
            {name: part for name, part in frozen.items() if name != "clip" or config.data.input == "image"}
        ),
        validator=validator,
        total=total,
        start=restored.step if restored else 0,
        losses=restored.position["losses"] if restored else [],
    )
    _describe(run, trained, frozen, console)
    if restored:
        _tell_going_on(run, restored.position["total"], console)
    return run, state


def _begin_params(config: Config, model: ClipCap, width: int) -> futures.Future[Params]:
    """Begin to make the parameters that nothing gives, as to compile their program takes as long as to tokenise."""
    pretrained = dataclasses.asdict(config.train.pretrained)
    without = [part for part, source in pretrained.items() if source]
    executor = futures.ThreadPoolExecutor(1, thread_name_prefix="compiler")
    begun = executor.submit(init_params, model, width, config.train.seed, without)
    executor.shutdown(wait=False)
    return begun


def _restore(config: Config, folder: Path, checkpoints: Checkpoints, console: Console) -> Restored | None:
    """The latest checkpoint that is whole, of a run with these settings; None: there is none yet."""
    steps = checkpoints.steps()
    if steps and not steps[-1]:
        raise UserError(
            f"{folder} holds converted weights, not a run: give another --workdir, and set "
            f"config.train.init_from={folder} to start from them."
        )
    damaged: list[tuple[int, store.Damaged]] = []
    for step in reversed(steps):
        try:
            metadata = checkpoints.metadata(step)
            check_same_run(config, metadata.config)
            shapes = param_shapes(ClipCap(config.model), metadata.embedding_width)
            trained = {name: shapes[name] for name in config.train.trainable}
            optimizer = jax.eval_shape(optim.optimizer(config.optimizer, 1).init, trained)
            restored = checkpoints.restore(step, trained, optimizer, averages=bool(config.optimizer.average_decay))
        except store.Damaged as error:
            damaged.append((step, error))
            continue
        for bad, reason in damaged:
            place = checkpoints.set_aside(bad)
            told = f"Warning: {reason} It is {place} now, and the one of step {step} is used."
            console.print(told, style="yellow", soft_wrap=True)
        return restored
    if damaged:
        raise damaged[0][1]
    return None


def _base(config: Config) -> tuple[Metadata | None, Params | None]:
    """The other run's best checkpoint that the config names to start from."""
    if not config.train.init_from:
        return None, None
    with store.opened(config.train.init_from) as other:
        step = other.find("best")
        return other.metadata(step), other.params(step)


def _open(config: Config, split: str) -> CaptionData:
    clip = config.model.clip if config.data.input == "image" else None
    return CaptionData(open_split(config.data.name, split, config.data.data_dir), clip.image_size if clip else None)


def _pairs(config: Config, data: CaptionData, tokenizer: Tokenizer, console: Console) -> Pairs:
    pairs = data.pairs(tokenizer, config.data.max_tokens, config.train.targets)
    if pairs.cut:
        console.print(
            f"{pairs.cut} of the {len(pairs)} captions of {data.name} are longer than config.data.max_tokens="
            f"{config.data.max_tokens} and were cut.",
            style="yellow",
            soft_wrap=True,
        )
    if tokenizer.unknown_id is not None:
        _tell_unknown(pairs.holding(tokenizer.unknown_id), pairs, data, tokenizer, console)
    return pairs


def _tell_unknown(rows: np.ndarray, pairs: Pairs, data: CaptionData, tokenizer: Tokenizer, console: Console) -> None:
    """Say what is not learnt because the tokenizer has no piece for it; `rows`: the pair of each such place."""
    if not len(rows):
        return
    some = [text for i in np.unique(pairs.examples[rows])[:_LOOKED_AT] for text in data.captions[int(i)]]
    frequent = Counter(part[:20] for text in some for part in tokenizer.unknown(text)).most_common(10)
    console.print(
        f"{len(np.unique(rows))} of the {len(pairs)} captions of {data.name} hold {len(rows)} pieces that the "
        f"tokenizer does not know, most often {' '.join(part for part, _ in frequent)}",
        style="yellow",
        soft_wrap=True,
    )


def _describe(run: Run, trained: Params, frozen: Params, console: Console) -> None:
    model = [
        f"{name} {sum(leaf.size for leaf in jax.tree.leaves(part)) / 1e6:.2f}M ({note})"
        for parts, note in ((trained, "trained"), (frozen, "frozen"))
        for name, part in parts.items()
    ]
    batch = run.config.train.batch_size
    lines = [
        f"Data: {run.data.name}, {len(run.data)} pictures, {len(run.pairs)} captions",
        f"Model: {', '.join(model)}",
        f"Devices: {parallel.describe_devices()}; layout {run.config.parallel.layout}",
        f"Batch: {batch} captions, {batch // parallel.device_count()} a device"
        + (f", in {run.config.train.accumulation} parts" if run.config.train.accumulation > 1 else ""),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    pretrained, config = dataclasses.asdict(run.config.train.pretrained), run.config.train
    if random := [name for name in frozen if not pretrained.get(name) and not config.init_from]:
        console.print(
            f"Warning: {', '.join(random)} will stay random: named neither in config.train.trainable nor in "
            "config.train.pretrained.",
            style="yellow",
            soft_wrap=True,
        )
    warmup_steps = run.config.optimizer.warmup_steps
    if warmup_steps >= run.total:
        console.print(
            f"Warning: config.optimizer.warmup_steps={warmup_steps} is not shorter than the run, {run.total} steps, so "
            "that the learning rate only rises. Train for more epochs"
            + (
                "."
                if run.start
                else f", or warm up for a tenth of them: --config.optimizer.warmup_steps={run.total // 10}"
            ),
            style="yellow",
            soft_wrap=True,
        )


def _tell_going_on(run: Run, total: int, console: Console) -> None:
    """`total`: how many steps the run had in the end until now."""
    told = f"Going on after step {run.start} of {run.total}"
    if run.total != total:
        then, now = (schedule(run.start) for schedule in (optim.schedule(run.config.optimizer, total), run.schedule))
        told += (
            f", not of {total} as until now: the learning rate goes from {float(then):.2g} to {float(now):.2g}, where "
            f"a run of {run.total} steps has it at this step"
        )
        if run.config.optimizer.warmup_steps < run.total:
            told += ", and falls to 0 at the new end"
    console.print(f"{told}.", soft_wrap=True)
