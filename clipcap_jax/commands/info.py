"""`clipcap info`."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from clipcap_jax import files
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    info = commands.add_parser("info", help="what a run's checkpoint is")
    info.set_defaults(run=_info)
    info.add_argument("run_folder", help="the folder of a run")
    info.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    info.add_argument("--json", action="store_true", help="as JSON, with all settings")


def _info(arguments: argparse.Namespace) -> None:
    from clipcap_jax.checkpoints import store

    run = store.run_folder(arguments.run_folder)
    found = describe(run, arguments.checkpoint)
    console = screen()
    if arguments.json:
        console.print(files.to_json(found, indent=2), soft_wrap=True)
        return
    for name, value in _lines(found):
        console.print(f"{name}: {value}", soft_wrap=True)


def describe(run: Path, which: str) -> dict[str, Any]:
    """All that `--json` shows of a checkpoint.

    Raises:
      UserError: there is no such checkpoint, or it or the run's evaluations cannot be read.
    """
    import jax

    from clipcap_jax.checkpoints import store
    from clipcap_jax.models.clipcap import ClipCap
    from clipcap_jax.training.step import param_shapes

    with store.opened(run) as checkpoints:
        step = checkpoints.find(which)
        metadata = checkpoints.metadata(step)
        steps, best, total = checkpoints.steps(), checkpoints.find("best"), checkpoints.total(step)
        validation = checkpoints.scores(step)
    config = metadata.config
    shapes = param_shapes(ClipCap(config.model), metadata.embedding_width)
    return {
        "run": str(run),
        "step": step,
        "total_steps": total,
        "steps": steps,
        "best_step": best,
        "best_by": store.BEST_METRIC if validation else None,
        "parameters": {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()},
        "encoder": metadata.encoder,
        "embedding_width": metadata.embedding_width,
        "tokenizer_pieces": metadata.tokenizer.size,
        "validation": validation,
        "evaluations": {name: found["scores"] for name, found in evaluations(run).items()},
        "config": dataclasses.asdict(config),
    }


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """What `scores.json` of each of a run's evaluations holds, by the names of their folders.

    Raises:
      UserError: one of them cannot be read.
    """
    try:
        with files.reached(run):
            folder = run / "evaluations"
            found = sorted(path / "scores.json" for path in folder.iterdir()) if folder.is_dir() else []
            read = {path.parent.name: json.loads(path.read_text()) for path in found if path.is_file()}
            for content in read.values():
                content["scores"].items()
            return read
    except OSError as error:
        raise UserError(f"{run} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds a scores.json that evaluate did not write: {error}") from error


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    steps = f"{found['step']} of {found['total_steps']}" if found["total_steps"] else "converted weights, not trained"
    lines = [("Run", found["run"]), ("Step", steps)]
    lines.append(("Checkpoints", f"{', '.join(map(str, found['steps']))}; best {found['best_step']}, by CIDEr"))
    lines += made_of(found)
    for name, scores in ({"validation": found["validation"]} | found["evaluations"]).items():
        if scores:
            lines.append(
                (
                    f"Scores, {name}",
                    ", ".join(f"{score} {value:.3f}" for score, value in scores.items() if value is not None),
                )
            )
    return lines


def made_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the model of a checkpoint is and how it was trained, as names and texts, of what `describe` gave."""
    config = found["config"]
    model, train, data = config["model"], config["train"], config["data"]
    lines = []
    for part, size in found["parameters"].items():
        learnt = "trained" if part in train["trainable"] else "frozen"
        sizes = ", ".join(f"{name} {value}" for name, value in model[part].items())
        lines.append((part, f"{size / 1e6:.2f}M parameters, {learnt}; {sizes}"))
    reads = "pictures" if data["input"] == "image" else f"embeddings {found['embedding_width']} wide"
    lines.append(("Reads", reads + (f", from {found['encoder']}" if found["encoder"] else "")))
    lines.append(("Tokenizer", f"{found['tokenizer_pieces']} pieces, from {config['tokenizer']['source']}"))
    lines.append(("Data", data["name"]))
    lines.append(
        (
            "Training",
            f"{train['epochs']:g} epochs, batches of {train['batch_size']}, learning rate "
            f"{config['optimizer']['learning_rate']:g} after {config['optimizer']['warmup_steps']} steps, seed "
            f"{train['seed']}" + (f", from {train['init_from']}" if train["init_from"] else ""),
        )
    )
    return lines
