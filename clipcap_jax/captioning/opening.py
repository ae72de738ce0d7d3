"""What a captioner is made of, wherever it lies."""

from pathlib import Path
from typing import Any

from clipcap_jax import files, hub
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.convert.assemble import open_original
from clipcap_jax.convert.package import open_hub
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen, without_warnings


def open_model(run: str | Path, checkpoint: str, **original: Any) -> tuple[Metadata, Any, int]:
    """What a checkpoint says about its model, the parameters and the step; see `Captioner.load`.

    Raises:
      UserError: there is no such checkpoint, or this version cannot read it; the hub does not give it.
    """
    if not files.is_remote(run) and files.place(run).is_file():
        return *open_original(files.place(run), **original), 0
    if original:
        raise UserError(f"{', '.join(original)}: for the original's .pt files alone, if for any, and {run} is none")
    if isinstance(run, str) and hub.is_name(run) and not files.place(run).exists():
        if checkpoint != "best":
            raise UserError(f"{run} is on the Hugging Face hub, which has one checkpoint: name a {run}@REVISION")
        return *open_hub(run), 0
    with without_warnings(), store.opened(run) as checkpoints:
        steps = [checkpoints.find(checkpoint)]
        if not checkpoint.isdigit():
            steps += [step for step in reversed(checkpoints.steps()) if step != steps[0]]
        while True:
            step = steps.pop(0)
            try:
                return checkpoints.metadata(step), checkpoints.params(step), step
            except store.Damaged as error:
                if not steps:
                    raise
                told = f"Warning: {error} The one of step {steps[0]} is tried."
                screen(stderr=True).print(told, style="yellow", soft_wrap=True)
