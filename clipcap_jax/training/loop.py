"""The training loop."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from clipcap_jax import cluster, parallel, signals
from clipcap_jax.checkpoints import settings
from clipcap_jax.checkpoints.store import Checkpoints, run_folder
from clipcap_jax.compiled import Compiled
from clipcap_jax.config import Config
from clipcap_jax.datasets.schema import open_builder, open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import Batch, coming_lengths, training_batches
from clipcap_jax.progress import screen
from clipcap_jax.training import wandb_log
from clipcap_jax.training.alone import Hold, alone
from clipcap_jax.training.logs import Monitor, NoLog, open_log
from clipcap_jax.training.run import Run, open_run
from clipcap_jax.training.step import Params, TrainState, make_step

_COMPILERS = min(8, max(1, (os.cpu_count() or 1) // 2))  # a compiler has threads of its own, and may take gigabytes

_LINES = 10  # of the log, in a short run


def train(config: Config, folder: str | Path, console: Console | None = None, wandb: str = "") -> None:
    """Train a captioner, or go on where the run stopped.

    Writes `config.json`, checkpoints, `metrics.jsonl` and TensorBoard's files to `folder`. SIGINT, SIGTERM and SIGHUP
    stop it after the step that is under way, with a checkpoint. The same call then goes on and ends with the parameters
    it would have had without the stop: bit by bit where the hardware computes the same twice, as CPUs and TPUs do; a
    GPU needs `XLA_FLAGS=--xla_gpu_deterministic_ops=true` for that.

    Args:
      config: everything about the run.
      folder: the run's, on a disk or on gs:// (see `store.run_folder`).
      console: where progress is shown, as `progress.screen` makes one, as another may take captions for markup; None:
        such a one.
      wandb: the project at Weights & Biases that gets the numbers too; "" for none.

    Raises:
      UserError: for anything the user can mend, such as a missing data set or a loss that is not finite.
    """
    folder, console = run_folder(folder), console or screen()
    if wandb and cluster.is_main():
        wandb_log.check(wandb)
    parallel.check_batch_size(config.train.batch_size, "config.train.batch_size", config.train.accumulation)
    # Before the run's folder is made, and data are unpacked: they may not be there.
    open_split(config.data.name, "train", config.data.data_dir)
    if config.evaluate.images and "val" not in open_builder(config.data.name, config.data.data_dir).info.splits:
        raise UserError(
            f"{config.data.name} has no split 'val' to validate on: prepare it with one, or train without: "
            "--config.evaluate.images=0"
        )
    with contextlib.ExitStack() as stack:
        hold = Hold()
        if cluster.is_main():
            hold = stack.enter_context(alone(folder, console))
        cluster.meet()
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder, keep=config.checkpoint.keep)))
        stack.enter_context(cluster.together())
        run, state = open_run(config, folder, checkpoints, console)
        if cluster.is_main():
            settings.write(folder, config)
        done = _take_steps(run, state, folder, checkpoints, hold, console, wandb)
    if done < run.total:
        told = f"Stopped after step {done} of {run.total}. `clipcap train --workdir={folder}` goes on from there."
        console.print(told, soft_wrap=True)
    else:
        console.print(f"Trained {run.total} steps. The run is in {folder}", soft_wrap=True)


def _take_steps(
    run: Run, state: TrainState, folder: Path, checkpoints: Checkpoints, hold: Hold, console: Console, wandb: str
) -> int:
    """Take the steps that are left, or those until a signal comes; returns how many are taken then."""
    config, step, stopping = run.config, run.start, False
    take_step = run.layout.map_step(
        _agreeing(
            run,
            make_step(
                run.model,
                run.optimizer,
                run.schedule,
                config.train,
                average_decay=config.optimizer.average_decay,
                layout=run.layout,
            ),
        )
    )
    with contextlib.ExitStack() as stack:
        log: NoLog = open_log(folder, run.start, hold, console) if cluster.is_main() else NoLog()
        if wandb and cluster.is_main():
            log = wandb_log.WandbLog(log, wandb, folder, config, console)
        stack.enter_context(contextlib.closing(log))
        monitor = Monitor(
            log,
            console,
            batch_size=config.train.batch_size,
            log_every=min(config.train.log_every, max(1, run.total // _LINES)),
            start=run.start,
            total=run.total,
            losses=run.losses,
        )
        stack.enter_context(contextlib.closing(monitor))
        stop = stack.enter_context(signals.stop(lambda: _answer(console)))
        batches = stack.enter_context(_batches(run, stop))
        executor = stack.enter_context(_compilers())
        while step < run.total and not stopping:
            batch = next(batches)
            state, metrics = take_step(state, run.frozen, batch)
            if step == run.start:  # not before: the first step would wait for them
                _begin_to_compile(run, take_step, executor, state, batch)
            step += 1
            monitor.push(step, metrics)
            hold.check()
            # Asked once, so that no step is the last without being saved; of several processes all stop after the same.
            stopping = monitor.stop if cluster.count() > 1 else stop.is_set()
            last = step == run.total
            validate = run.validator is not None and (last or step % config.evaluate.every == 0)
            if validate or last or stopping or step % config.checkpoint.every == 0:
                with monitor.paused():  # which first waits for the step, and stops here if it was not finite
                    scores = _validate(run, step, state, log, console, monitor) if validate else {}
                    hold.look()
                    hold.check()
                    log.keep()
                    _save(run, step, state, list(monitor.losses), checkpoints, scores)
        checkpoints.wait()  # before the log is closed, which tells whether the training failed
    return step


@contextlib.contextmanager
def _compilers() -> Iterator[futures.Executor]:
    """Threads that compile; those that are at it are waited for, as nothing stops a compiler but the process's end."""
    executor = futures.ThreadPoolExecutor(_COMPILERS, thread_name_prefix="compiler")
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown(cancel_futures=True)


def _begin_to_compile(
    run: Run, take_step: Compiled, executor: futures.Executor, state: TrainState, batch: Batch
) -> None:
    """Let steps for the other lengths of captions be compiled, several at once, while the first ones are taken."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    state, frozen, batch = jax.tree.map(shape, (state, run.frozen, batch))
    tokens: Any = batch["tokens"]
    for length in coming_lengths(run.pairs, **_order(run)):
        longer = jax.ShapeDtypeStruct((*tokens.shape[:-1], length), tokens.dtype, sharding=tokens.sharding)
        take_step.begin(executor, state, frozen, {**batch, "tokens": longer})


def _answer(console: Console) -> None:
    console.print(
        "Stopping after the step that is under way, with a checkpoint. A second Ctrl-C stops at once, without.",
        soft_wrap=True,
    )


def _agreeing(run: Run, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose metrics say whether any process was asked to stop when its batch was sent."""

    def agreeing(state: TrainState, frozen: Params, batch: Batch) -> Any:
        flags, batch = batch["stop"], {name: rows for name, rows in batch.items() if name != "stop"}
        state, metrics = step(state, frozen, batch)
        return state, {**metrics, "stop": run.layout.sum_over_devices(flags.sum())}

    return agreeing


def _order(run: Run) -> dict[str, int]:
    """Which batches the steps that are left have."""
    return {
        "batch_size": run.config.train.batch_size,
        "pool_batches": run.config.data.pool_batches,
        "seed": run.config.train.seed,
        "steps": run.total,
        "start": run.start,
    }


@contextlib.contextmanager
def _batches(run: Run, stop: threading.Event) -> Iterator[Iterator[Batch]]:
    batches = training_batches(
        run.data,
        run.pairs,
        **_order(run),
        workers=run.config.data.workers,
        host=cluster.index(),
        hosts=cluster.count(),
    )
    with contextlib.closing(batches):  # and with them their threads
        flagged = ({**batch, "stop": parallel.flag(stop.is_set())} for batch in batches)
        yield parallel.send_ahead(flagged, run.layout.send)


def _save(
    run: Run, step: int, state: TrainState, losses: list[float], checkpoints: Checkpoints, scores: dict[str, float]
) -> None:
    checkpoints.save(
        step,
        params=parallel.for_saving(state.best),
        unaveraged=None if state.average is None else parallel.for_saving(state.params),
        optimizer=parallel.for_saving(state.opt_state),
        position={"step": step, "total": run.total, "losses": losses, "fingerprint": run.data.fingerprint},
        metadata=run.metadata,
        metrics=scores,
    )


def _validate(
    run: Run, step: int, state: TrainState, log: NoLog, console: Console, monitor: Monitor
) -> dict[str, float]:
    if run.validator is None:
        return {}
    # Whole parameters on every device, for that long: what does not fit so is to be trained without validation.
    params = run.layout.on_every_device({**run.frozen, **state.best})
    with monitor.beside("validating", run.validator.total) as advance:
        validation = run.validator(params, advance)
    metrics = validation.metrics
    log.write(step, {f"val/{name}": value for name, value in metrics.items()})
    chosen = list(validation.captions.items())[:: max(1, len(validation.captions) // 4)]
    samples = [f"{image_id}: {caption}" for image_id, caption in chosen]
    log.text(step, "val/captions", "\n\n".join(samples))
    console.print(
        f"step {step}  validation loss {metrics['loss']:.3f} ({metrics['loss_permuted']:.3f} with other pictures)  "
        f"CIDEr {metrics['CIDEr']:.3f}  BLEU-4 {metrics['Bleu_4']:.3f}",
        soft_wrap=True,
    )
    for sample in samples:
        console.print(f"    {sample}", style="dim", soft_wrap=True)
    if validation.collapsed:
        console.print(
            f"Warning: {len(validation.captions)} pictures have only {validation.distinct} "
            f"caption{'s' * (validation.distinct > 1)} between them. "
            "Early in training that is normal; if it lasts, the model does not use its pictures.",
            style="yellow",
            soft_wrap=True,
        )
    return metrics
