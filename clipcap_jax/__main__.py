"""The `clipcap` command; `python -m clipcap_jax` is the same."""

import argparse
import importlib.metadata
import sys

from absl import logging

from clipcap_jax.commands import caption, cli, convert, data, demo, doctor, evaluate, info, score, train

# One for each verb, which its --help shows.
EXAMPLES = {
    "prepare": "clipcap prepare records --name mine --images photos/ --captions captions.jsonl",
    "embed": "clipcap embed coco --clip timm/resnet50x4_clip.openai",
    "train": "clipcap train --config flickr8k:pixels --workdir runs/mine --config.train.epochs=3",
    "evaluate": "clipcap evaluate --workdir runs/mine --split test",
    "caption": "clipcap caption runs/mine photos/ --output captions.jsonl",
    "demo": "clipcap demo runs/mine",
    "info": "clipcap info runs/mine --json",
    "score": "clipcap score captions.json references.json --output page.html --images photos/",
    "submit": "clipcap submit nocaps --test captions.json nocaps_test_image_info.json --output results.json",
    "convert": "clipcap convert to-gpt2 runs/mine gpt2-mine/",
    "doctor": "clipcap doctor",
}


def main(*verb: str) -> None:
    """Run it; `verb`: the first of its arguments, where the command line has the others alone."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save and a restore
    parser, given = make_parser(), [*verb, *sys.argv[1:]]
    if not given:
        parser.print_help()
        return
    arguments, others = parser.parse_known_args(given)
    arguments.others = others
    if others and not getattr(arguments, "beam", getattr(arguments, "settings", False)):
        cli.refuse(arguments, others)
    cli.run_script(lambda: arguments.run(arguments))


def make_parser() -> argparse.ArgumentParser:
    """What reads its arguments."""
    parser = argparse.ArgumentParser(
        prog="clipcap",
        description="Train and evaluate captioners; caption pictures; prepare data sets; score captions.",
        epilog="It ends with 0; with 2 for a mistake, which it names; with 130 for Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("clipcap_jax"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (data, train, evaluate, caption, demo, info, score, convert, doctor):
        module.add(commands)
    for name, command in commands.choices.items():
        command.epilog = f"Example: {EXAMPLES[name]}"
        _name_itself(command)
    return parser


def _name_itself(command: argparse.ArgumentParser) -> None:
    """So that a mistake is told with how the command itself is called."""
    command.set_defaults(parser=command)
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _name_itself(part)


if __name__ == "__main__":
    main()
