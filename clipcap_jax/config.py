"""What a training run is made of, as frozen dataclasses, built from the ml_collections configs in `configs/`.

No field has a default: a config file shows every setting there is.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clipcap_jax.errors import UserError
from clipcap_jax.models import clip_resnet, clip_vit, gpt2
from clipcap_jax.models.clip_vit import ClipVitConfig
from clipcap_jax.models.clipcap import ClipCapConfig

ModelPart = Literal["clip", "mapper", "gpt2"]
Targets = Literal["all", "original"]

# Names that may stand for sizes: `model.clip="RN50x4"`, `model.gpt2="gpt2"`.
PRESETS: dict[str, Any] = {**clip_vit.PRESETS, **clip_resnet.PRESETS, **gpt2.PRESETS}

# Fields whose 0 has a meaning; every other number is greater.
_MAY_BE_0 = {
    "average_decay",
    "beta1",
    "beta2",
    "clip_norm",
    "dropout",
    "images",
    "label_smoothing",
    "learning_rate",
    "length_penalty",
    "seed",
    "warmup_steps",
    "weight_decay",
    "word_dropout",
    "workers",
}
_BELOW_1 = {"average_decay", "beta1", "beta2", "dropout", "label_smoothing", "word_dropout"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from.

    Attributes:
      name: a prepared data set, such as "shapes" or "records/mine".
      data_dir: the folder that data sets are prepared in.
      input: whether the model reads the data set's pictures or its stored embeddings.
      max_tokens: the longest caption, the end token included; what is longer is cut and counted.
      pool_batches: captions are sorted by length within random pools of this many batches, so that batches hold
        little padding; 1: not sorted.
      workers: threads that read and decode; 0: none but the one that trains.
    """

    name: str
    data_dir: str
    input: Literal["image", "embedding"]
    max_tokens: int
    pool_batches: int
    workers: int


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`source`: a folder or a Hugging Face hub name, or "captions": a byte-level BPE of `model.gpt2.vocab_size` pieces
    trained on the training captions."""

    source: str


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """Weights that a new run's `clip` and `gpt2` start from, as `clipcap_jax.convert` reads them: a file, a folder or a
    name on the Hugging Face hub ("timm/resnet50x4_clip.openai", "gpt2", "gpt2@REVISION"); "": none."""

    clip: str
    gpt2: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings.

    Attributes:
      learning_rate: the peak, reached after `warmup_steps`; from there it falls linearly to 0 at the end of the run.
      warmup_steps: a shorter run warms up to its end, with a warning.
      weight_decay: on the matrices; not on biases, norms and embeddings.
      beta1, beta2, epsilon: Adam's.
      clip_norm: gradients with a larger global norm are scaled down to it; 0: never.
      average_decay: what is validated and used afterwards is the exponential moving average of the parameters over the
        steps (Polyak and Juditsky 1992), with this decay a step; 0: the parameters of the last step.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    average_decay: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
      seed: of parameters, data order and dropout.
      epochs: passes over all (picture, caption) pairs; may be a fraction. A run that goes on may get more: from
        the step where it is, its learning rate is then that of a run which had as many from the beginning.
      batch_size: pairs per step, over all devices.
      trainable: the parts that learn; the others get no gradients and no optimiser state.
      pretrained: weights to start from; the rest starts at random.
      init_from: a run whose parameters to start from, with a fresh optimiser; "": none.
      targets: "all": a caption's tokens and the end token are learnt; "original": as in the original's code there is no
        end token, and token 0 is not learnt, wherever it stands.
      label_smoothing: see `training.loss.caption_loss`.
      accumulation: micro-batches that a step splits a device's share of its batch into, one after the other, so that
        their activations are never in memory together.
      remat: whether the backward pass computes a layer's activations anew, from the layer's input, instead of finding
        all layers' in memory: a third more arithmetic. In the mapper and GPT-2, not in the tower.
      gradient_dtype: what gradients are summed over devices in; "bfloat16" halves what they exchange, and is for
        `parallel.layout` "data": in the other, they are exchanged as XLA computes them.
      log_every: steps between log lines; in a run that is shorter than ten times as many, a tenth of its steps.
    """

    seed: int
    epochs: float
    batch_size: int
    trainable: tuple[ModelPart, ...]
    pretrained: PretrainedConfig
    init_from: str
    targets: Targets
    label_smoothing: float
    accumulation: int
    remat: bool
    gradient_dtype: Literal["float32", "bfloat16"]
    log_every: int


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How captions are searched for.

    Attributes:
      beam_size: W; 1 is greedy decoding.
      max_tokens: the longest caption, the end token included.
      length_penalty: hypotheses are ranked by log-probability / length ** length_penalty; 1 is the original's mean.
      stop: the text of the token that ends a caption and belongs to it, "." for models that the original trained; "":
        the end-of-text token.
    """

    beam_size: int
    max_tokens: int
    length_penalty: float
    stop: str


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Validation while training, and the decoding that `evaluate.py` and `clipcap caption` use unless told otherwise.

    Attributes:
      every: steps between validations, the last of which is at the end of the run, however short; each also saves a
        checkpoint.
      images: pictures of the validation split that are captioned and scored each time; 0: none.
      words: what scores count as a word: "ptb", as every paper does; "characters", for scripts without spaces;
        "spaces", of captions that are segmented already (see `metrics.words.split_all`).
      batch_size: pictures per step, over all devices.
      decode: how captions are searched for.
    """

    every: int
    images: int
    words: Literal["ptb", "characters", "spaces"]
    batch_size: int
    decode: DecodeConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`every`: steps between checkpoints to restart from, the last of which is at the end of the run, however short;
    `keep`: how many of the newest are kept beside the best."""

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a training step is spread over devices.

    `layout`: "data", all of them hold all parameters and their optimiser's state; "fsdp", for models that are too large
    for that, each holds a part, and layers are gathered one at a time (see `clipcap_jax.parallel`).
    """

    layout: Literal["data", "fsdp"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that `train.py` reads."""

    data: DataConfig
    tokenizer: TokenizerConfig
    model: ClipCapConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested mappings, such as `ConfigDict.to_dict()`.

    Raises:
      UserError: for a missing, unknown or wrongly typed entry, a number out of its range, or parts that contradict
        each other.
    """
    config: Config = _build(Config, values, "config")
    if config.data.input == "image" and config.model.clip is None:
        raise UserError('config.data.input is "image", but config.model.clip is None: a vision tower is needed')
    if config.train.pretrained.gpt2 and config.tokenizer.source == "captions":
        raise UserError(
            "config.train.pretrained.gpt2 needs the tokenizer that it was trained with: set config.tokenizer.source to "
            'its folder or its name on the Hugging Face hub, such as "gpt2"'
        )
    if (
        config.data.input == "embedding"
        and config.model.clip is not None
        and not (config.train.pretrained.clip or config.train.init_from)
    ):
        raise UserError(
            "config.model.clip is set, but the model learns from stored embeddings: name the weights that made them in "
            "config.train.pretrained.clip, so that the run can caption pictures too, or set config.model.clip to None"
        )
    if "clip" in config.train.trainable and config.data.input == "embedding":
        raise UserError('config.train.trainable names "clip", but the model reads stored embeddings, not pictures')
    if not config.train.trainable:
        raise UserError("config.train.trainable is empty: name at least one of clip, mapper, gpt2")
    if config.parallel.layout == "fsdp" and config.train.gradient_dtype != "float32":
        raise UserError(
            'config.train.gradient_dtype is "bfloat16", but with config.parallel.layout="fsdp" XLA sums gradients as '
            'it computes them, those of matrices in config.model.dtype: set it to "float32"'
        )
    _check_sizes(config.model)
    longest = config.model.mapper.prefix_length + max(config.data.max_tokens, config.evaluate.decode.max_tokens)
    if longest > config.model.gpt2.positions:
        raise UserError(
            f"config.model.gpt2.positions is {config.model.gpt2.positions}, but prefix and caption take up to {longest}"
        )
    if config.evaluate.decode.beam_size > config.model.gpt2.vocab_size:
        raise UserError("config.evaluate.decode.beam_size is larger than config.model.gpt2.vocab_size")
    return config


def _check_sizes(model: ClipCapConfig) -> None:
    clip, mapper, gpt2 = model.clip, model.mapper, model.gpt2
    heads = {"gpt2": (gpt2.heads, gpt2.width)}
    if mapper.kind == "transformer":
        heads["mapper"] = (mapper.heads, gpt2.width)
    if clip is not None:
        heads["clip"] = (clip.heads, clip.width if isinstance(clip, ClipVitConfig) else 32 * clip.width)
        multiple, of = (clip.patch_size, "patch_size, ") if isinstance(clip, ClipVitConfig) else (32, "")
        if clip.image_size % multiple:
            raise UserError(
                f"config.model.clip.image_size is {clip.image_size}: it has to be a multiple of {of}{multiple}"
            )
    for part, (count, width) in heads.items():
        if width % count:
            raise UserError(f"config.model.{part}.heads is {count}: it has to divide the width, {width}")


def _build(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass([kind], value, path)
    if origin is types.UnionType:  # of dataclasses and perhaps None: the one whose fields are most like those given
        if value in (None, "none") and types.NoneType in arguments:  # "none": no flag can say None
            return None
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        if isinstance(value, str) and value.startswith("{"):  # as a command line gives several fields
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        if isinstance(value, Mapping):
            kinds = [max(kinds, key=lambda kind: len(set(value) & set(typing.get_type_hints(kind))))]
        return _build_dataclass(kinds, value, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{path} is {value!r}; it can be {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(
            f"{path} is {value!r}, a {type(value).__name__}; it has to be a {getattr(kind, '__name__', kind)}"
        )
    if kind in (int, float):
        _check_range(value, path)
    return value


def _check_range(value: float, path: str) -> None:
    name = path.rpartition(".")[2]
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{path} is {value}: it has to be a number that is not negative")
    if value == 0 and name not in _MAY_BE_0:
        raise UserError(f"{path} is 0: it has to be greater")
    if value >= 1 and name in _BELOW_1:
        raise UserError(f"{path} is {value}: it has to be below 1")


def _build_dataclass(kinds: Sequence[Any], values: Any, path: str) -> Any:
    if isinstance(values, str) and isinstance(preset := PRESETS.get(values), tuple(kinds)):
        return preset
    if not isinstance(values, Mapping):
        presets = [name for name, preset in PRESETS.items() if isinstance(preset, tuple(kinds))]
        raise UserError(
            f"{path} is {values!r}; it has to hold the fields of {' or '.join(kind.__name__ for kind in kinds)}"
            + (f", or be one of {', '.join(presets)}" if presets else "")
        )
    (kind,) = kinds
    types_of = typing.get_type_hints(kind)
    for name in values:
        if name not in types_of:
            close = difflib.get_close_matches(name, types_of, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(types_of)}"
            raise UserError(f"{path}.{name} is not a setting: {hint}")
    missing = [name for name in types_of if name not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return kind(**{name: _build(types_of[name], values[name], f"{path}.{name}") for name in types_of})
