"""`clipcap push` and `clipcap pull`: a run's checkpoint as a repository of the Hugging Face hub."""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from clipcap_jax import hub
from clipcap_jax.commands import info
from clipcap_jax.commands.card import make_card
from clipcap_jax.commands.convert import check_new_folder, load_run, write_run
from clipcap_jax.errors import UserError, first
from clipcap_jax.progress import screen

_CARD = "README.md"


def add(commands: Any) -> None:
    """Add them to the parser's commands."""
    push = commands.add_parser("push", help="put a run's checkpoint on the Hugging Face hub, with a model card")
    push.set_defaults(run=_push)
    push.add_argument("run_folder", help="the folder of a run")
    push.add_argument("name", help="the repository, user/name; a new one is made")
    push.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    push.add_argument("--private", action="store_true", help="nobody else may see a new repository")
    push.add_argument("--license", help="as the hub calls it, such as apache-2.0 [none is given]")
    push.add_argument("--message", help="of the commit [which checkpoint it is]")
    pull = commands.add_parser("pull", help="make a run's folder of a captioner on the Hugging Face hub")
    pull.set_defaults(run=_pull)
    pull.add_argument("name", help="the repository, user/name")
    pull.add_argument("folder", nargs="?", help="the folder to write [runs/NAME]")
    pull.add_argument("--revision", help="a branch, a tag or a commit in its 40 digits [the newest]")


def _push(arguments: argparse.Namespace) -> None:
    from clipcap_jax.checkpoints import store
    from clipcap_jax.convert.package import is_package, portable, save_package

    name, run = arguments.name, store.run_folder(arguments.run_folder)
    found = info.describe(run, arguments.checkpoint)
    arguments.checkpoint = str(found["step"])  # the best one may be another a moment later
    step = f"step {found['step']}"
    scores = {
        evaluation: content
        for evaluation, content in info.evaluations(run).items()
        if content.get("details", {}).get("checkpoint") == step
    }
    there, names = hub.check_push(name, private=arguments.private)
    others = sorted(names - {".gitattributes"})  # which the hub makes
    if others and not is_package(f"{name}@{there}"):
        raise UserError(
            f"{name} is there already, and holds {first(others)}, which clipcap did not put there: name another "
            "repository, or empty that one on the hub"
        )
    metadata, params = load_run(arguments)
    found["config"] = dataclasses.asdict(portable(metadata.config))
    with tempfile.TemporaryDirectory() as folder:
        made = save_package(Path(folder), metadata, params, scores)
        card = Path(folder, _CARD)
        card.write_text(make_card(name, found, scores, arguments.license), encoding="utf-8")
        address = hub.push(
            name,
            [card, *made],
            after=there,
            private=arguments.private,
            message=arguments.message or f"Put {step} here",
        )
    screen().print(f"{arguments.run_folder}, {step}, is now {address}", soft_wrap=True)


def _pull(arguments: argparse.Namespace) -> None:
    from clipcap_jax.checkpoints import store
    from clipcap_jax.convert.package import open_hub

    name = arguments.name
    if not hub.is_name(name):
        raise UserError(f"{name!r} is no name of a repository on the Hugging Face hub: give user/name")
    if arguments.revision:
        if "@" in name:
            raise UserError(f"{name} names a revision, and so does --revision: leave one out")
        name = f"{name}@{arguments.revision}"
    folder = store.run_folder(arguments.folder or f"runs/{name.partition('@')[0].partition('/')[2]}")
    check_new_folder(folder)
    write_run(folder, *open_hub(name))
    screen().print(f"{name} is now in {folder}: clipcap caption {folder} PICTURES", soft_wrap=True)
