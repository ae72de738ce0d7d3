"""A checkpoint of the original, its tower and its tokenizer put together to what `clipcap caption` loads."""

import dataclasses
from pathlib import Path
from typing import Any

from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecodeConfig,
    EvaluateConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainedConfig,
    TokenizerConfig,
    TrainConfig,
)
from clipcap_jax.convert import gpt2
from clipcap_jax.convert.clip import load_clip
from clipcap_jax.convert.original import HEADS, load_original
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Published:
    """What a checkpoint of the original does not say about itself.

    Attributes:
      clip: the weights of the tower that it was trained with.
      encoder: the tower's name.
      normalize_embedding: whether embeddings were scaled to unit length (`--normalize_prefix`).
    """

    clip: str
    encoder: str
    normalize_embedding: bool


_VIT_B_32 = Published("timm/vit_base_patch32_clip_224.openai", "ViT-B/32", normalize_embedding=False)
_RN50X4 = Published("timm/resnet50x4_clip.openai", "RN50x4", normalize_embedding=True)

# The checkpoints that the original's README links to. P=10 of the MLPs and P=C=40 are in their shapes.
PUBLISHED = {"coco-mlp": _VIT_B_32, "conceptual-mlp": _VIT_B_32, "coco-transformer": _RN50X4}


def open_original(
    path: Path,
    *,
    published: str | None = None,
    clip: str | None = None,
    normalize: bool = False,
    tokenizer: str | None = None,
    mapper_heads: int | None = None,
    gpt2_heads: int | None = None,
    clip_heads: int | None = None,
) -> tuple[Metadata, Any]:
    """As `from_original`, by what a user can say of a file of the original.

    Args:
      path: the `.pt` file.
      published: one of `PUBLISHED`.
      clip: weights of the tower that it was trained with, "none" for a captioner of embeddings; None: as published.
      normalize: whether it was trained with `--normalize_prefix`.
      tokenizer: None: OpenAI's, of GPT-2.
      mapper_heads, gpt2_heads, clip_heads: None: as the original has them, or as it can be told.

    Raises:
      UserError: as `from_original`; or too little is said, or something that is not so.
    """
    if published:
        if published not in PUBLISHED:
            raise UserError(f"the option published is {published!r}: it can be {', '.join(PUBLISHED)}")
        if normalize:
            raise UserError("the option normalize is known of published checkpoints: leave it out")
        known = PUBLISHED[published]
    elif clip:
        known = Published("", "", normalize)
    else:
        raise UserError(
            f"{path} does not say which CLIP it was trained with: give the option published ({', '.join(PUBLISHED)}) "
            "or clip"
        )
    if clip:
        known = dataclasses.replace(known, clip="" if clip == "none" else clip)
    return from_original(
        path,
        known,
        tokenizer or gpt2.OPENAI,
        mapper_heads=mapper_heads or HEADS,
        gpt2_heads=gpt2_heads,
        clip_heads=clip_heads,
    )


def from_original(
    path: Path,
    published: Published,
    tokenizer: str,
    *,
    mapper_heads: int = HEADS,
    gpt2_heads: int | None = None,
    clip_heads: int | None = None,
) -> tuple[Metadata, Any]:
    """A captioner of pictures from the original's file, that stops and searches as the original does.

    Args:
      path: the `.pt` file.
      published: what it was trained with; an empty `clip` makes a captioner of embeddings.
      tokenizer: of its language model, a folder or a name on the hub.
      mapper_heads, gpt2_heads, clip_heads: see `load_original` and `load_clip`.

    Returns:
      What a checkpoint says about the model, and the parameters.

    Raises:
      UserError: one of the files is not there or not what it should be, or they do not fit together.
    """
    model, embedding_width, params = load_original(
        path,
        normalize_embedding=published.normalize_embedding,
        mapper_heads=mapper_heads,
        gpt2_heads=gpt2_heads,
    )
    if published.clip:
        clip, clip_params = load_clip(published.clip, clip_heads)
        if clip.embedding_width != embedding_width:
            raise UserError(
                f"{path} reads embeddings of width {embedding_width}, and {published.clip} makes them "
                f"{clip.embedding_width} wide: it was trained with another tower"
            )
        model = dataclasses.replace(model, clip=clip)
        params = {**params, "clip": clip_params}
    # `predict.py` writes up to 67 tokens; where GPT-2's positions end sooner, the original would fail.
    max_tokens = min(67, model.gpt2.positions - model.mapper.prefix_length)
    config = Config(
        # How the original trains (its train.py and the paper, section 4), as far as a checkpoint does not show it.
        data=DataConfig(
            name="the original's",
            data_dir="data",
            input="image" if published.clip else "embedding",
            max_tokens=max_tokens,
            pool_batches=1,
            workers=4,
        ),
        tokenizer=TokenizerConfig(tokenizer),
        model=model,
        optimizer=OptimizerConfig(
            2e-5, 5000, 0.0, beta1=0.9, beta2=0.999, epsilon=1e-6, clip_norm=0.0, average_decay=0.0
        ),
        train=TrainConfig(
            seed=0,
            epochs=10.0,
            batch_size=40,
            trainable=("mapper",) if model.mapper.kind == "transformer" else ("mapper", "gpt2"),
            pretrained=PretrainedConfig("", ""),
            init_from="",
            targets="original",
            label_smoothing=0.0,
            accumulation=1,
            remat=False,
            gradient_dtype="float32",
            log_every=100,
        ),
        parallel=ParallelConfig("data"),
        evaluate=EvaluateConfig(
            every=5000,
            images=1000,
            words="ptb",
            batch_size=64,
            # `predict.py`, `generate_beam`.
            decode=DecodeConfig(beam_size=5, max_tokens=max_tokens, length_penalty=1.0, stop="."),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=1),
    )
    metadata = Metadata(
        config=config,
        tokenizer=Tokenizer.load(tokenizer),
        encoder="" if published.clip else published.encoder,
        embedding_width=embedding_width,
    )
    if metadata.tokenizer.size > model.gpt2.vocab_size:
        raise UserError(f"{tokenizer} has more pieces than {path} has embeddings: it is not its tokenizer")
    return metadata, params
