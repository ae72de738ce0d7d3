"""The `clipcap` command; `python -m clipcap_jax` is the same."""

import argparse
import importlib.metadata

from absl import logging

from clipcap_jax.commands import caption, cli, convert, data, score


def main() -> None:
    """Run it."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a restore
    parser = argparse.ArgumentParser(prog="clipcap", description="Caption pictures; prepare data sets; score captions.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("clipcap_jax"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (caption, data, score, convert):
        module.add(commands)
    arguments, others = parser.parse_known_args()
    if others and not getattr(arguments, "beam", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    cli.run_script(lambda: arguments.run(arguments))


if __name__ == "__main__":
    main()
