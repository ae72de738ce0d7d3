"""Whether a run fits its data, what it was until now, and what it starts from: if not, each raises a `UserError`."""

from rich.console import Console

from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.checkpoints.store import Restored
from clipcap_jax.config import Config
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.inputs.embed import encoder_name
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.training.optim import total_steps
from clipcap_jax.training.step import Params, param_shapes


def check_same_data(restored: Restored, data: CaptionData, pairs: int) -> None:
    position, total = restored.position, total_steps(restored.metadata.config.train, pairs)
    same = position.get("fingerprint") in (None, data.fingerprint)  # None: an older version did not store it
    if position["total"] != total or not same:
        raise UserError(
            f"{data.name} is not what it was: the run was started with {position['total']} steps, and now there are "
            f"{total}, of {'the same' if same else 'other'} data. Prepare it as it was, or give another --workdir."
        )


def check_not_shorter(restored: Restored, config: Config, total: int) -> None:
    """A run may get more epochs; fewer would end it at once, also where a restart has only forgotten how many."""
    if total < restored.position["total"]:
        raise UserError(
            f"config.train.epochs was {restored.metadata.config.train.epochs:g}, is {config.train.epochs:g}: a run "
            "that goes on can get more, not fewer. Without --config, it goes on as it was."
        )


def check_same_encoder(config: Config, data: CaptionData, base: Metadata) -> None:
    if data.encoder and base.encoder and data.encoder != base.encoder:
        raise UserError(
            f"{data.name} holds embeddings from {data.encoder}, but {config.train.init_from} was trained on "
            f"embeddings from {base.encoder}"
        )


def check_same_model(config: Config, model: ClipCap, width: int, params: Params) -> None:
    if changed := store.differences(param_shapes(model, width), params):
        raise UserError(
            f"{config.train.init_from} is a checkpoint of another architecture. "
            f"{len(changed)} parameters differ, the first ones:\n  " + "\n  ".join(changed[:5])
        )


def check_encoder(config: Config, data: CaptionData, params: Params, console: Console) -> None:
    """Stored embeddings and the tower that shall caption pictures after training have to go together."""
    clip, stored = config.model.clip, data.encoder
    if clip is None or config.data.input == "image":
        return
    tower = encoder_name(clip, params["clip"])
    if stored and "weights" in stored and stored != tower:
        raise UserError(f"{data.name} holds embeddings from {stored}; the tower of the config is {tower}")
    if not stored or "weights" not in stored:
        console.print(
            f"{data.name} does not say which weights made its embeddings: that they are those of "
            f"config.train.pretrained.clip cannot be checked.",
            style="yellow",
            soft_wrap=True,
        )
