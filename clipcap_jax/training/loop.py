"""The training loop."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from clipcap_jax import files, parallel
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.store import Checkpoints, Metadata
from clipcap_jax.config import Config
from clipcap_jax.datasets.schema import open_builder, open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData, Pairs, steps_per_epoch, training_batches
from clipcap_jax.inputs.embed import encoder_name
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training import optim
from clipcap_jax.training.logs import MetricsLog, Monitor
from clipcap_jax.training.run import check_same_run, choose_tokenizer, load_pretrained
from clipcap_jax.training.step import Params, TrainState, init_params, make_step
from clipcap_jax.training.validation import Validator


def train(config: Config, run: Path, console: Console) -> None:
    """Train a captioner, or go on where the run stopped.

    Writes checkpoints, `metrics.jsonl` and TensorBoard's files to `run`. SIGINT, SIGTERM and SIGHUP stop it after the
    step that is under way, with a checkpoint. The same call then goes on and ends with the parameters it would have had
    without the stop: bit by bit where the hardware computes the same twice, as CPUs and TPUs do; a GPU needs
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true` for that.

    Args:
      config: everything about the run.
      run: the run's folder.
      console: where progress is shown.

    Raises:
      UserError: for anything the user can mend, such as a missing data set or a loss that is not finite.
    """
    if parallel.process_count() > 1:
        raise UserError("several hosts cannot train together yet: start on one, which uses all of its devices")
    parallel.check_batch_size(config.train.batch_size, "config.train.batch_size")
    # Before the run's folder is made, and data are unpacked: they may not be there.
    open_split(config.data.name, "train", config.data.data_dir)
    if config.evaluate.images and "val" not in open_builder(config.data.name, config.data.data_dir).info.splits:
        raise UserError(
            f"{config.data.name} has no split 'val' to validate on: prepare it with one, or train without: "
            "--config.evaluate.images=0"
        )
    with _alone(run), contextlib.closing(Checkpoints(run, keep=config.checkpoint.keep)) as checkpoints:
        _Run(config, run, checkpoints, console).train()


class _Run:
    """What a run makes once, and its loop."""

    def __init__(self, config: Config, folder: Path, checkpoints: Checkpoints, console: Console):
        self.config, self.folder, self.checkpoints, self.console = config, folder, checkpoints, console
        self.start = checkpoints.find("latest") if checkpoints.steps() else 0
        if checkpoints.steps() and not self.start:
            raise UserError(
                f"{folder} holds converted weights, not a run: give another --workdir, and set "
                f"config.train.init_from={folder} to start from them."
            )
        self.losses: list[float] = []  # of the steps since the last line of the log
        base, base_params = self._base()

        self.data = self._open("train")
        tokenizer = choose_tokenizer(config, base, self.data.captions)
        self.pairs = self._pairs(self.data, tokenizer)
        if not len(self.pairs):
            raise UserError(f"{self.data.name} holds no captions to train on")
        self.total = max(1, round(config.train.epochs * steps_per_epoch(len(self.pairs), config.train.batch_size)))
        self.batches = training_batches(
            self.data,
            self.pairs,
            batch_size=config.train.batch_size,
            pool_batches=config.data.pool_batches,
            seed=config.train.seed,
            steps=self.total,
            workers=config.data.workers,
            start=self.start,
            host=parallel.process_index(),
            hosts=parallel.process_count(),
        )
        self.model = ClipCap(config.model)
        clip, width = config.model.clip, self.data.embedding_width
        if clip is not None and width not in (None, clip.embedding_width):
            raise UserError(
                f"{self.data.name} holds embeddings of width {width}; config.model.clip makes them "
                f"{clip.embedding_width} wide"
            )
        self.metadata = Metadata(
            config=config,
            tokenizer=tokenizer,
            encoder=self.data.encoder or "",
            embedding_width=width or clip.embedding_width,  # type: ignore[union-attr]
        )
        self.validator = self._validator(tokenizer) if config.evaluate.images else None
        self.optimizer = optim.optimizer(config.optimizer, self.total)
        self.state, self.frozen = self._initial_state(base_params)
        self._describe()
        self.state, self.frozen = parallel.replicate((self.state, self.frozen))

    def train(self) -> None:
        """Take the steps that are left."""
        config = self.config
        take_step = parallel.map_step(
            make_step(
                self.model,
                self.optimizer,
                dropout=config.train.trainable,  # what is frozen is used as it is
                label_smoothing=config.train.label_smoothing,
                targets=config.train.targets,
            )
        )
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(contextlib.closing(MetricsLog(self.folder, self.start)))
            monitor = Monitor(
                log,
                self.console,
                optim.schedule(config.optimizer, self.total),
                batch_size=config.train.batch_size,
                log_every=config.train.log_every,
                start=self.start,
                total=self.total,
                losses=self.losses,
            )
            stack.enter_context(contextlib.closing(monitor))
            stop = stack.enter_context(_stop_signals())
            stack.enter_context(contextlib.closing(self.batches))  # and with them their threads
            batches = parallel.send_ahead(self.batches)
            step, stopping = self.start, False
            while step < self.total and not stopping:
                self.state, metrics = take_step(self.state, self.frozen, next(batches))
                step += 1
                monitor.push(step, metrics)
                stopping = stop.is_set()  # asked once, so that no step is the last without being saved
                validate = step % config.evaluate.every == 0 or step == self.total
                if validate or stopping or step % config.checkpoint.every == 0:
                    with monitor.paused():  # which first waits for the step, and stops here if it was not finite
                        self._save(step, self._validate(step, log) if validate else {})
        if step < self.total:
            self.console.print(f"Stopped after step {step} of {self.total}. The same command goes on from there.")
        else:
            self.console.print(f"Trained {self.total} steps. The run is in {self.folder}")

    def _params(self) -> Params:
        """What is validated: the averages, where they are kept."""
        return {**self.frozen, **optim.swap_average(self.state.params, self.state.opt_state)[0]}

    def _save(self, step: int, metrics: dict[str, float]) -> None:
        self.checkpoints.save(
            step,
            params=jax.device_get(self._params()),
            optimizer=jax.device_get(optim.swap_average(self.state.params, self.state.opt_state)[1]),
            position={
                "step": step,
                "total": self.total,
                "key": np.asarray(self.state.key).tolist(),
                "losses": self.losses,
                "fingerprint": self.data.fingerprint,
            },
            metadata=self.metadata,
            metrics=metrics,
        )

    def _validate(self, step: int, log: MetricsLog) -> dict[str, float]:
        if self.validator is None:
            return {}
        validation = self.validator(self._params())
        metrics = validation.metrics
        log.write(step, {f"val/{name}": value for name, value in metrics.items()})
        chosen = list(validation.captions.items())[:: max(1, len(validation.captions) // 4)]
        samples = [f"{image_id}: {caption}" for image_id, caption in chosen]
        log.text(step, "val/captions", "\n\n".join(samples))
        self.console.print(
            f"step {step}  validation loss {metrics['loss']:.3f} ({metrics['loss_permuted']:.3f} with other pictures)  "
            f"CIDEr {metrics['CIDEr']:.3f}  BLEU-4 {metrics['Bleu_4']:.3f}",
            highlight=False,
        )
        for sample in samples:
            self.console.print(f"    {sample}", highlight=False, markup=False, style="dim")
        if validation.collapsed:
            self.console.print(
                f"Warning: only {validation.distinct} different captions for {len(validation.captions)} pictures. "
                "Early in training that is normal; if it lasts, the model does not use its pictures.",
                style="yellow",
            )
        return metrics

    def _open(self, split: str) -> CaptionData:
        config = self.config
        clip = config.model.clip if config.data.input == "image" else None
        return CaptionData(open_split(config.data.name, split, config.data.data_dir), clip.image_size if clip else None)

    def _pairs(self, data: CaptionData, tokenizer: Tokenizer) -> Pairs:
        pairs = data.pairs(tokenizer, self.config.data.max_tokens, self.config.train.targets)
        if pairs.cut:
            self.console.print(
                f"{pairs.cut} of the {len(pairs)} captions of {data.name} are longer than config.data.max_tokens="
                f"{self.config.data.max_tokens} and were cut.",
                style="yellow",
            )
        return pairs

    def _validator(self, tokenizer: Tokenizer) -> Validator:
        data = self._open("val")
        return Validator(self.model, tokenizer, data, self._pairs(data, tokenizer), self.config)

    def _base(self) -> tuple[Metadata | None, Params | None]:
        """The checkpoint to start from: the run's own latest, or another run's best."""
        if self.start:
            stored = self.checkpoints.metadata(self.start)
            check_same_run(self.config, stored.config)
            return stored, None  # its parameters are restored with the optimiser's state
        if self.config.train.init_from:
            with store.opened(self.config.train.init_from) as other:
                step = other.find("best")
                return other.metadata(step), other.params(step)
        return None, None

    def _initial_state(self, base_params: Params | None) -> tuple[TrainState, Params]:
        config = self.config
        params = init_params(self.model, self.metadata.embedding_width, config.train.seed)
        if base_params is not None:
            if changed := store.differences(params, base_params):
                raise UserError(
                    f"{config.train.init_from} is a checkpoint of another architecture. "
                    f"{len(changed)} parameters differ, the first ones:\n  " + "\n  ".join(changed[:5])
                )
            params = base_params
        if not self.start:
            params |= load_pretrained(config, self.console)
            self._check_encoder(params)
        missing = set(config.train.trainable) - set(params)
        if missing:
            raise UserError(f"config.train.trainable names {', '.join(missing)}, which this model does not have")
        trained: Params = {name: part for name, part in params.items() if name in config.train.trainable}
        frozen = {name: part for name, part in params.items() if name not in config.train.trainable}
        state = TrainState(
            step=jnp.int32(0),
            key=jax.random.key_data(jax.random.key(config.train.seed)),
            params=trained,
            opt_state=self.optimizer.init(trained),
        )
        if not self.start:
            return state, frozen
        params, opt_state, position = self.checkpoints.training_state(self.start, params, state.opt_state)
        same = position.get("fingerprint") in (None, self.data.fingerprint)  # None: an older version did not store it
        if position["total"] != self.total or not same:
            raise UserError(
                f"{self.data.name} is not what it was: the run was started with {position['total']} steps, and now "
                f"there are {self.total}, of {'the same' if same else 'other'} data. Prepare it as it was, or give "
                "another --workdir."
            )
        self.losses = position["losses"]
        trained, opt_state = optim.swap_average({name: params[name] for name in trained}, opt_state)
        state = TrainState(
            step=jnp.int32(position["step"]),
            key=jnp.array(position["key"], jnp.uint32),
            params=trained,
            opt_state=opt_state,
        )
        return state, {name: params[name] for name in frozen}

    def _check_encoder(self, params: Params) -> None:
        """Stored embeddings and the tower that shall caption pictures after training have to go together."""
        clip, stored = self.config.model.clip, self.data.encoder
        if clip is None or self.config.data.input == "image":
            return
        tower = encoder_name(clip, params["clip"])
        if stored and "weights" in stored and stored != tower:
            raise UserError(f"{self.data.name} holds embeddings from {stored}; the tower of the config is {tower}")
        if not stored or "weights" not in stored:
            self.console.print(
                f"{self.data.name} does not say which weights made its embeddings: that they are those of "
                f"config.train.pretrained.clip cannot be checked.",
                style="yellow",
            )

    def _describe(self) -> None:
        parts = [
            f"{name} {sum(leaf.size for leaf in jax.tree.leaves(part)) / 1e6:.2f}M{note}"
            for parts, note in ((self.state.params, ""), (self.frozen, " (frozen)"))
            for name, part in parts.items()
        ]
        self.console.print(
            f"{self.data.name}: {len(self.data)} pictures, {len(self.pairs)} captions. "
            f"Model: {', '.join(parts)}. {parallel.describe_devices()}.",
            highlight=False,
        )
        pretrained, config = dataclasses.asdict(self.config.train.pretrained), self.config.train
        if random := [name for name in self.frozen if not pretrained.get(name) and not config.init_from]:
            self.console.print(
                f"Warning: {', '.join(random)} will stay random: named neither in config.train.trainable nor in "
                "config.train.pretrained.",
                style="yellow",
            )
        if self.start:
            self.console.print(f"Going on after step {self.start} of {self.total}.")


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keep a second training out of a run's folder: the two would mix their checkpoints."""
    with contextlib.ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(run / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(f"another process is training in {run}: wait for it, or give another --workdir") from None
        except OSError as error:
            raise UserError(f"{run} cannot be written: {error.strerror}") from error
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that is set when the process is asked to stop; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def request(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signum, previous[signal.Signals(signum)])

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]  # as nohup sets it
    previous = {signum: signal.signal(signum, request) for signum in heeded}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
