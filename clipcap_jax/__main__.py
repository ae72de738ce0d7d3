"""The `clipcap` command; `python -m clipcap_jax` is the same."""

import argparse
import importlib.metadata
import sys

from absl import logging

from clipcap_jax.commands import caption, cli, convert, data, doctor, evaluate, info, score, train


def main(*verb: str) -> None:
    """Run it; `verb`: the first of its arguments, where the command line has the others alone."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save and a restore
    parser = argparse.ArgumentParser(
        prog="clipcap",
        description="Train and evaluate captioners; caption pictures; prepare data sets; score captions.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("clipcap_jax"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (data, train, evaluate, caption, info, score, convert, doctor):
        module.add(commands)
    for command in commands.choices.values():
        _name_itself(command)
    given = [*verb, *sys.argv[1:]]
    if not given:
        parser.print_help()
        return
    arguments, others = parser.parse_known_args(given)
    arguments.others = others
    if others and not getattr(arguments, "beam", getattr(arguments, "settings", False)):
        cli.refuse(arguments, others)
    cli.run_script(lambda: arguments.run(arguments))


def _name_itself(command: argparse.ArgumentParser) -> None:
    """So that a mistake is told with how the command itself is called."""
    command.set_defaults(parser=command)
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _name_itself(part)


if __name__ == "__main__":
    main()
