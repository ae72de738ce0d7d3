"""`clipcap train`, which `train.py` is too."""

import argparse
from typing import Any

from argcomplete.completers import FilesCompleter

from clipcap_jax import config_files, jobs
from clipcap_jax.commands.cli import add_cluster_options, cpus, refuse, start_processes
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
    config = train.add_argument(
        "--config",
        help="what to train, and how: a config by name, such as flickr8k, flickr8k:pixels or finetune:RUN, or a .py "
        "file [the one of the run in --workdir; without that, shapes]",
    )
    config.completer = _complete_config
    train.add_argument("--workdir", help="the run's folder [runs/<name of the config>]")
    train.add_argument(
        "--wandb", metavar="PROJECT", default="", help="send the numbers to this project at Weights & Biases too"
    )
    add_cluster_options(train)


def _complete_config(prefix: str, **_: Any) -> list[str]:
    return [*config_files.names(), *FilesCompleter("py")(prefix)]


def _train(arguments: argparse.Namespace) -> None:
    if unknown := [other for other in arguments.others if other[:1] == "-" and not config_files.is_setting(other)]:
        refuse(arguments, unknown, config_files.setting_names(config_files.read("shapes")))
    if arguments.workdir == "":
        raise UserError("--workdir is empty: name the run's folder")
    config, workdir, settings = arguments.config, arguments.workdir, arguments.others
    if config is None and workdir is None:
        config = "shapes"
    if config is not None:  # a slip is told before all processes have found each other
        workdir = workdir or f"runs/{config_files.name_of(config)}"
        config = config_files.read(config)
        config_files.change(config, settings)
        settings = ()
    console = start_processes(arguments)
    jobs.train(config, workdir, settings, wandb=arguments.wandb, processes=cpus(), console=console)
