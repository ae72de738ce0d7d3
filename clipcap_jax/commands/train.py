"""`clipcap train`, which `train.py` is too."""

import argparse
from typing import Any

from clipcap_jax.commands.cli import add_cluster_options, refuse, start_processes
from clipcap_jax.errors import UserError


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    train = commands.add_parser(
        "train",
        help="train a captioner",
        description="Train a captioner, or go on where the run in its folder stopped. "
        "Every setting of its config can be changed, as by --config.train.epochs=3.",
    )
    train.set_defaults(run=_train, settings=True)
    train.add_argument(
        "--config",
        help="what to train, and how: a config by name, such as flickr8k or flickr8k:pixels, or a .py file [the one of "
        "the run in --workdir; without that, shapes]",
    )
    train.add_argument("--workdir", help="the run's folder [runs/<name of the config>]")
    add_cluster_options(train)


def _train(arguments: argparse.Namespace) -> None:
    from clipcap_jax import config_files

    if unknown := [other for other in arguments.others if other[:1] == "-" and not config_files.is_setting(other)]:
        refuse(arguments, unknown)
    if arguments.workdir == "":
        raise UserError("--workdir is empty: name the run's folder")
    if arguments.config is None and arguments.workdir is None:
        arguments.config = "shapes"
    if arguments.config is not None:
        values = config_files.read(arguments.config)
        config_files.change(values, arguments.others)

    from clipcap_jax import cluster, config, datasets  # which takes seconds
    from clipcap_jax.checkpoints import settings, store
    from clipcap_jax.training import loop

    console = start_processes(arguments)
    run = store.run_folder(arguments.workdir or f"runs/{config_files.name_of(arguments.config)}")
    if arguments.config is None:
        if (own := settings.read(run)) is None:
            names = ", ".join(config_files.names())
            raise UserError(f"{run} holds no run to go on with: name by --config what to train there, such as {names}")
        values = config_files.as_read(own)
        config_files.change(values, arguments.others)
    chosen = config.from_dict(values.to_dict())
    if chosen.data.name == "shapes":  # drawn rather than downloaded, so nobody needs to ask for it
        with cluster.in_turn():
            console.print(datasets.prepare_shapes(chosen.data.data_dir))
    loop.train(chosen, run, console)
