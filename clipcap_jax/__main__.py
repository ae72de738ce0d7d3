"""The `clipcap` command; `python -m clipcap_jax` is the same."""

import argparse
import importlib.metadata
import sys

import argcomplete
from absl import logging

from clipcap_jax import progress
from clipcap_jax.commands import (
    caption,
    cli,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    info,
    prefix,
    score,
    share,
    train,
)

# One for each verb, which its --help shows.
EXAMPLES = {
    "prepare": "clipcap prepare records --name mine --images photos/ --captions captions.jsonl",
    "embed": "clipcap embed coco --clip timm/resnet50x4_clip.openai",
    "train": "clipcap train --config flickr8k:pixels --workdir runs/mine --config.train.epochs=3",
    "evaluate": "clipcap evaluate --workdir runs/mine --split test",
    "caption": "clipcap caption runs/mine photos/ --output captions.jsonl",
    "prefix": "clipcap prefix runs/mine one.png --output prefix.html",
    "demo": "clipcap demo runs/mine",
    "info": "clipcap info runs/mine --json",
    "score": "clipcap score captions.json references.json --output page.html --images photos/",
    "submit": "clipcap submit nocaps --test captions.json nocaps_test_image_info.json --output results.json",
    "convert": "clipcap convert to-gpt2 runs/mine gpt2-mine/",
    "push": "clipcap push runs/mine user/name --license apache-2.0",
    "pull": "clipcap pull user/name runs/theirs",
    "doctor": "clipcap doctor",
}


def main(*verb: str) -> None:
    """Run it; `verb`: the first of its arguments, where the command line has the others alone."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save and a restore
    parser, given = make_parser(), [*verb, *sys.argv[1:]]
    argcomplete.autocomplete(parser)  # ends here where a shell asks
    if not given:
        parser.print_help()
        return
    arguments, others = parser.parse_known_args(given)
    arguments.others = others
    if others and not getattr(arguments, "beam", getattr(arguments, "settings", False)):
        cli.refuse(arguments, others)
    if arguments.quiet:
        progress.hide()
    cli.run_script(lambda: arguments.run(arguments), debug=arguments.debug)


def make_parser() -> argparse.ArgumentParser:
    """What reads its arguments."""
    parser = argparse.ArgumentParser(
        prog="clipcap",
        description="Train, evaluate and share captioners; caption pictures; prepare data sets; score captions.",
        epilog="It ends with 0; with 2 for a mistake, which it names; with 130 for Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("clipcap_jax"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (data, train, evaluate, caption, demo, prefix, info, score, convert, share, doctor):
        module.add(commands)
    for name, command in commands.choices.items():
        command.epilog = f"Example: {EXAMPLES[name]}"
        _complete(command)
    return parser


def _complete(command: argparse.ArgumentParser) -> None:
    """Give a command what all have; and its name, so that a mistake is told with how the command itself is called."""
    command.set_defaults(parser=command)
    parts = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    for part in parts:
        for below in part.choices.values():
            _complete(below)
    if not parts:
        command.add_argument("--quiet", action="store_true", help="show no progress")
        command.add_argument("--debug", action="store_true", help="show where in the code a mistake was noticed")


if __name__ == "__main__":
    main()
