"""A captioner as a repository of the Hugging Face hub holds it: four files, and nothing in them that could be run.

config.json        what a checkpoint says about its model (see `checkpoints.metadata`), and `library_name`
tokenizer.json     its tokenizer, as the library `tokenizers` writes it
model.safetensors  all its parameters, float32, by names such as "mapper/in/kernel"
scores.json        the evaluations of this checkpoint, by name, as `scores.json` of each has them
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from clipcap_jax import files, hub
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.checkpoints.store import differences
from clipcap_jax.config import Config
from clipcap_jax.convert import weights
from clipcap_jax.convert.mapping import some
from clipcap_jax.errors import UserError
from clipcap_jax.models.clipcap import ClipCap

LIBRARY = "clipcap_jax"
_CONFIG, _TOKENIZER, _WEIGHTS, _SCORES = "config.json", "tokenizer.json", "model.safetensors", "scores.json"


def save_package(folder: Path, metadata: Metadata, params: Any, scores: dict[str, Any]) -> list[Path]:
    """Write a captioner's files into a folder that is there; returns where they are.

    Raises:
      UserError: they cannot be written.
    """
    from safetensors.numpy import save_file

    stored = dataclasses.replace(metadata, config=portable(metadata.config)).to_dict()
    texts = {
        _TOKENIZER: stored["tokenizer"].pop("tokenizer_json"),
        _CONFIG: files.to_json({"library_name": LIBRARY, **stored}, indent=2),
        _SCORES: files.to_json(scores, indent=2),
    }
    for name, text in texts.items():
        with files.whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    arrays = traverse_util.flatten_dict(params, sep="/")
    with files.whole(folder / _WEIGHTS) as path:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return [folder / name for name in (*texts, _WEIGHTS)]


def portable(config: Config) -> Config:
    """Without what is of one machine and nobody else's business: folders, of which the last one's name is left."""

    def bare(source: str) -> str:
        return Path(source).name if source.startswith(("/", "~")) else source

    train, pretrained = config.train, config.train.pretrained
    pretrained = dataclasses.replace(pretrained, clip=bare(pretrained.clip), gpt2=bare(pretrained.gpt2))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data_dir="data"),
        tokenizer=dataclasses.replace(config.tokenizer, source=bare(config.tokenizer.source)),
        train=dataclasses.replace(train, pretrained=pretrained, init_from=bare(train.init_from)),
    )


def is_package(source: str) -> bool:
    """Whether a repository of the hub, "user/name@COMMIT", is a captioner's.

    Raises:
      UserError: the hub does not give it.
    """
    try:
        return weights.read_config(hub.fetch(source, _CONFIG)).get("library_name") == LIBRARY
    except hub.Absent:
        return False


def open_hub(source: str) -> tuple[Metadata, Any]:
    """A captioner from the hub. None of its files is run, and no other is downloaded.

    Args:
      source: the repository, "user/name" or "user/name@REVISION".

    Returns:
      What a checkpoint says about the model, and the parameters.

    Raises:
      UserError: the hub does not give it; it is not a captioner's, or of a newer version; its files are not whole, or
        do not belong together.
    """
    try:
        path = hub.fetch(source, _CONFIG)
        stored = weights.read_config(path)
        if stored.get("library_name") != LIBRARY:
            raise UserError(
                f"{source} on the Hugging Face hub holds no captioner of clipcap_jax: its {_CONFIG} says so"
            )
        pinned = hub.pinned(source, path)  # a branch may move between one file and the next
        tokenizer, tensors = hub.fetch(pinned, _TOKENIZER), hub.fetch(pinned, _WEIGHTS)
    except hub.Absent as error:
        raise UserError(f"{source} on the Hugging Face hub holds no captioner of clipcap_jax: {error}") from error
    metadata = _metadata(source, stored, tokenizer)
    return metadata, _params(source, metadata, tensors)


def _metadata(source: str, stored: dict[str, Any], tokenizer: Path) -> Metadata:
    try:
        stored["tokenizer"]["tokenizer_json"] = tokenizer.read_text(encoding="utf-8")
        metadata = Metadata.from_dict(stored)
        if type(metadata.embedding_width) is not int or type(metadata.encoder) is not str:
            raise ValueError("embedding_width or encoder is of another type")
        if metadata.embedding_width < 1 or metadata.tokenizer.size > metadata.config.model.gpt2.vocab_size:
            raise ValueError("its sizes do not fit together")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it may hold anything, and Rust's panics are no Exception
        raise UserError(f"{source} on the Hugging Face hub holds a captioner that cannot be read: {error}") from error
    return dataclasses.replace(metadata, config=portable(metadata.config))


def _params(source: str, metadata: Metadata, path: Path) -> Any:
    found = weights.read_safetensors(path)
    clip, tokens = metadata.config.model.clip, jnp.zeros((1, 2), jnp.int32)
    pictures = clip and jnp.zeros((1, clip.image_size, clip.image_size, 3), jnp.uint8)
    inputs = jnp.zeros((1, metadata.embedding_width)) if pictures is None else pictures
    shapes = jax.eval_shape(ClipCap(metadata.config.model).init, jax.random.key(0), inputs, tokens)["params"]
    problems = differences(traverse_util.flatten_dict(shapes, sep="/"), found)
    problems += [f"{name}: {array.dtype}" for name, array in found.items() if array.dtype != np.float32]
    if problems:
        raise UserError(f"{source} on the Hugging Face hub holds weights of another model: {some(problems)}")
    return traverse_util.unflatten_dict(found, sep="/")
