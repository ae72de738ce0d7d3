"""What a run starts from: pretrained parts and a tokenizer; or, when it goes on, the settings that it had."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from clipcap_jax import hub
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import Config
from clipcap_jax.convert import clip, gpt2
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer


def load_pretrained(config: Config, console: Console) -> dict[str, Any]:
    """The parts that `config.train.pretrained` names.

    Raises:
      UserError: there are no such weights, they have other sizes than the model, or `init_from` is set too.
    """
    pretrained = config.train.pretrained
    parts: dict[str, Any] = {}
    for part, source, files_of, load in (
        ("clip", pretrained.clip, clip.FILES, clip.load_clip),
        ("gpt2", pretrained.gpt2, gpt2.FILES, gpt2.load_gpt2),
    ):
        if not source:
            continue
        if config.train.init_from:
            raise UserError(f"config.train.init_from and config.train.pretrained.{part} are both set: choose one")
        path = hub.locate(source, files_of)
        console.print(f"{part} from {hub.pinned(source, path)}", soft_wrap=True)
        sizes: Any = getattr(config.model, part)
        found, parts[part] = load(str(path), sizes.heads if sizes else None)
        if part == "gpt2":  # whose dropout is a setting of the training
            found = dataclasses.replace(found, dropout=sizes.dropout, word_dropout=sizes.word_dropout)
        if found != sizes:
            raise UserError(f"{source} is {found}, but config.model.{part} is {sizes}")
    return parts


def choose_tokenizer(config: Config, base: Metadata | None, captions: Sequence[tuple[str, ...]]) -> Tokenizer:
    """The run's tokenizer: the one the base checkpoint was trained with, or else what the config names.

    Where the config names what the base checkpoint's does, it may be gone by now: then the checkpoint's own is taken.

    Raises:
      UserError: the config names another one than the base checkpoint's, or one with more pieces than the model has.
    """
    source, vocab_size = config.tokenizer.source, config.model.gpt2.vocab_size
    if source == "captions":
        if base is not None:
            return base.tokenizer
        return Tokenizer.train((text for texts in captions for text in texts), vocab_size)
    try:
        tokenizer = Tokenizer.load(source)
    except UserError:
        if base is not None and source == base.config.tokenizer.source:
            return base.tokenizer
        raise
    if base is not None and not tokenizer.same_ids(base.tokenizer):
        raise UserError(
            f"the tokenizer {source!r} is not the one that the checkpoint was trained with, and its ids "
            'would mean other words: set config.tokenizer.source="captions" to take the checkpoint\'s'
        )
    if tokenizer.size > vocab_size:
        raise UserError(f"{source} has {tokenizer.size} pieces, more than config.model.gpt2.vocab_size={vocab_size}")
    return tokenizer


# What may change when a run goes on, because it does not change what is learnt; and how long that takes.
_FREE_TO_CHANGE = (
    "config.data.data_dir",
    "config.data.workers",
    "config.train.epochs",  # which changes the learning rate of the steps that are left: it is told
    "config.train.remat",
    "config.train.log_every",
    "config.parallel.layout",
    "config.evaluate.every",  # but not what is captioned and how: CIDErs are compared to find the best checkpoint
    "config.evaluate.batch_size",
    "config.checkpoint.",
)


def check_same_run(config: Config, stored: Config) -> None:
    """Raise a UserError that names what differs between the settings of a run and those it was started with."""
    changed = [
        f"{name} was {then!r}, is {now!r}"
        for name, then, now in _changes("config", dataclasses.asdict(stored), dataclasses.asdict(config))
        if not name.startswith(_FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            "the run's folder holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nGive another --workdir, or set config.train.init_from to that folder to start a new run from its "
            "parameters."
        )


def _changes(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ: name, value then, value now."""
    if isinstance(then, dict) and isinstance(now, dict):  # of the same dataclass, so they have the same fields
        for field in then:
            yield from _changes(f"{name}.{field}", then[field], now[field])
    elif then != now:
        yield name, then, now
