"""The options that say how captions are made: those of `Captioner.caption`, under the same names."""

import argparse
from typing import Any

from clipcap_jax.commands.cli import positive

_OPTIONS: dict[str, dict[str, Any]] = {
    "n": {"type": positive, "help": "captions of each picture: the best of the beam, or as many drawn [1]"},
    "beam_size": {"type": positive, "help": "hypotheses per picture, 1 for greedy [as the run's config says]"},
    "max_tokens": {"type": positive, "help": "the longest caption, after the prompt [as the run's config says]"},
    "min_tokens": {"type": positive, "help": "tokens before which no caption ends"},
    "length_penalty": {"type": float, "help": "above 1 prefers longer captions [as the run's config says]"},
    "repetition_penalty": {"type": float, "help": "above 1, what a caption has already is less likely [1]"},
    "banned": {"action": "append", "metavar": "TEXT", "help": "a word or phrase that does not occur; may be repeated"},
    "prompt": {"metavar": "TEXT", "help": "what captions go on from, and begin with"},
    "temperature": {"type": float, "help": "captions are drawn, above 1 more freely [searched for]"},
    "top_k": {"type": positive, "help": "captions are drawn, of the likeliest tokens only so many [searched for]"},
    "top_p": {"type": float, "help": "captions are drawn, of the tokens that together are as likely [searched for]"},
    "seed": {"type": int, "help": "captions are drawn, others for each seed [0, where they are drawn]"},
}


def add_options(command: argparse.ArgumentParser) -> None:
    """For a command that captions."""
    group = command.add_argument_group("how captions are made")
    for name, option in _OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", **option)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said, as keywords; a seed wherever captions are drawn, so that the same command draws the same."""
    said = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    if said.keys() & {"temperature", "top_k", "top_p"}:
        said.setdefault("seed", 0)
    return said
