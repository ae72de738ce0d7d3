"""What `device.py` and `tpu_compile.py` compile: this package's programs, at the paper's sizes, and their arithmetic.

The paper's tables fit CLIP RN50x4, whose embeddings are 640 wide, GPT-2 124M and a prefix of 10. Needs jax, flax and
numpy; training optax too.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from clipcap_jax import parallel
from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.config import DecodeConfig, ModelPart
from clipcap_jax.models import clip_resnet, clip_vit, gpt2
from clipcap_jax.models.clipcap import ClipCap, ClipCapConfig, ClipConfig, tower
from clipcap_jax.models.mapper import MapperConfig
from clipcap_jax.training.loss import caption_loss

Kind = Literal["mlp", "transformer"]
Dtype = Literal["float32", "bfloat16"]

EMBEDDING = 640
END_TOKEN = 50256
TOTAL_STEPS = 100_000  # of a run, which decide the learning rate
TRAINABLE: dict[Kind, tuple[ModelPart, ...]] = {
    "mlp": ("mapper", "gpt2"),
    "transformer": ("mapper",),
}  # the two variants
GPT2S = gpt2.PRESETS | {
    "tiny": gpt2.Gpt2Config(512, 64, 64, 2, 2, dropout=0.1, word_dropout=0.0),
    "small": gpt2.Gpt2Config(8192, 64, 256, 4, 4, dropout=0.1, word_dropout=0.0),
}
TOWERS: dict[str, ClipConfig] = {
    **clip_vit.PRESETS,
    **clip_resnet.PRESETS,
    "tiny ViT": clip_vit.ClipVitConfig(32, 16, 64, 2, 1, 32),
    "tiny ResNet": clip_resnet.ClipResnetConfig(32, 8, (1, 1, 1, 1), 4, 32),
}

# COCO's captions of val2017, all 25,014, by their GPT-2 tokens, the end token among them: the mean is 12.9.
# fmt: off
COCO_LENGTHS = np.repeat(
    [*range(8, 37), 40, 43, 46, 47, 51, 54, 58],
    [73, 809, 3070, 4329, 4739, 4054, 2923, 1849, 1136, 716, 430, 274, 185, 111, 87, 56, 33, 28, 29, 26, 16, 11, 3, 4,
     4, 2, 4, 1, 3, 2, 2, 1, 1, 1, 1, 1],
)
# fmt: on
# To how many tokens training pads its batches of them (`data.LENGTHS`, pools of 50 batches), with each one's share of
# the steps at a batch of 256; and the one that is nearest to the mean, 14.5.
PADDED = {12: 0.51, 14: 0.276, 16: 0.122, 20: 0.071, 48: 0.01, 64: 0.01}
TOKENS = 14
ORIGINAL_TOKENS = 39  # to which the original pads every caption of COCO


def captioner(kind: Kind, sizes: str = "gpt2", clip: str | None = None, dtype: Dtype = "bfloat16") -> ClipCap:
    """A model of these sizes; in float32, products are exact on every device."""
    config = ClipCapConfig(
        clip=TOWERS[clip] if clip else None,
        mapper=MapperConfig(kind, prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.0),
        gpt2=GPT2S[sizes],
        normalize_embedding=False,
        dtype=dtype,
        matmul_precision="highest" if dtype == "float32" else "default",
    )
    return ClipCap(config)


def embedding_width(model: ClipCap) -> int:
    return model.config.clip.embedding_width if model.config.clip else EMBEDDING


@functools.cache
def param_shapes(model: ClipCap) -> Any:
    inputs = jnp.zeros((1, embedding_width(model)))
    if clip := model.config.clip:
        inputs = jnp.zeros((1, clip.image_size, clip.image_size, 3), jnp.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), inputs, jnp.zeros((1, 2), jnp.int32))["params"]


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Float32 arrays of these shapes, as large as fresh GPT-2s have them; drawn by NumPy, so the same everywhere."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape, np.float32)
        return 1 + np.float32(0.1) * values if path[-1].key == "scale" else np.float32(0.02) * values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_embeddings(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, EMBEDDING), np.float32)


def random_batch(model: ClipCap, batch_size: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Pairs of random embeddings and tokens, lengths drawn from those of COCO's captions that are padded to so many."""
    random = np.random.default_rng(seed)
    shorter = max((length for length in PADDED if length < tokens), default=0)
    fitting = [length for length in COCO_LENGTHS if shorter < length <= tokens]
    return {
        "inputs": random_embeddings(batch_size, seed),
        "tokens": random.integers(1, model.config.gpt2.vocab_size, (batch_size, tokens), np.int32),
        "lengths": random.choice(fitting, batch_size).astype(np.int32),
    }


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def training_step(
    model: ClipCap, layout: parallel.Layout = parallel.DATA_PARALLEL, *, remat: bool = False
) -> Callable[..., Any]:
    """`step.make_step` as the configs of the paper's two variants have it, in this layout."""
    from clipcap_jax.config import PretrainedConfig, TrainConfig
    from clipcap_jax.training import optim
    from clipcap_jax.training.step import make_step

    train = TrainConfig(
        seed=0,
        epochs=10.0,
        batch_size=40,
        trainable=TRAINABLE[model.config.mapper.kind],
        pretrained=PretrainedConfig("", ""),
        init_from="",
        targets="all",
        label_smoothing=0.0,
        accumulation=1,
        remat=remat,
        gradient_dtype="float32",
        log_every=100,
    )
    return make_step(model, adamw(), optim.schedule(adamw_settings(), TOTAL_STEPS), train, layout=layout)


def adamw() -> Any:
    from clipcap_jax.training import optim

    return optim.optimizer(adamw_settings(), TOTAL_STEPS)


def adamw_settings() -> Any:
    from clipcap_jax.config import OptimizerConfig

    return OptimizerConfig(
        learning_rate=2e-5,
        warmup_steps=5000,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-6,
        clip_norm=0.0,
        average_decay=0.0,
    )


def training_state(model: ClipCap, params: Any) -> tuple[Any, Any]:
    """The state that a run begins with, and the parameters of the parts that are frozen; of shapes: their shapes."""
    from clipcap_jax.training.step import TrainState

    trainable = TRAINABLE[model.config.mapper.kind]
    trained = {name: part for name, part in params.items() if name in trainable}
    frozen = {name: part for name, part in params.items() if name not in trainable}

    def begin(trained: Any) -> Any:
        return TrainState(jnp.int32(0), trained, None, adamw().init(trained))

    abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    return (jax.eval_shape(begin, trained) if abstract else begin(trained)), frozen


def validation_loss(model: ClipCap) -> Callable[..., Any]:
    """What `validation.LossMeter` sums over devices."""

    def loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, batch["inputs"], batch["tokens"])
        return caption_loss(logits, batch["tokens"], batch["lengths"])

    return loss


def best_captions(model: ClipCap, beam_size: int, max_tokens: int) -> Callable[..., Hypotheses]:
    """What `batches.BatchCaptioner` maps over devices, but the best hypothesis of each input alone."""
    decode = DecodeConfig(beam_size, max_tokens, length_penalty=1.0, stop="")
    end_token = min(END_TOKEN, model.config.gpt2.vocab_size - 1)

    def best(params: Any, inputs: jax.Array) -> Hypotheses:
        return jax.tree.map(lambda x: x[:, 0], beam_search(model, params, inputs, decode, end_token))

    return best


def embed_pictures(config: ClipConfig, dtype: Dtype) -> Callable[..., jax.Array]:
    """What `embed` maps over devices."""
    model = tower(config, jnp.dtype(dtype))

    def embed(params: Any, pixels: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return model.apply({"params": params}, clip_vit.normalize_pixels(pixels))

    return embed


def tower_shapes(config: ClipConfig) -> Any:
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return jax.eval_shape(tower(config, jnp.dtype("float32")).init, jax.random.key(0), pixels)["params"]


class Product(NamedTuple):
    """A matrix product or convolution of a program: `flops` of all times that it runs, not counting a `while`, inside
    which it is if `looped`; `float32`, whether it reads float32."""

    flops: int
    looped: bool
    float32: bool


def products(function: Callable[..., Any], *arguments: Any) -> list[Product]:
    """Every product that a function computes with arguments of these shapes, two FLOPs a multiplication."""
    axes = [(parallel.AXIS, 1)]  # steps sum over it
    jaxpr = jax.make_jaxpr(function, axis_env=axes)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler leaves out the others
    return list(_products(used, 1, looped=False))


def _products(jaxpr: Any, times: int, looped: bool) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (variable.aval for variable in equation.invars[:2])
            size = equation.outvars[0].aval.size
            if name == "dot_general":
                inner = np.prod([left.shape[axis] for axis in equation.params["dimension_numbers"][0][0]], dtype=int)
            else:
                inner = right.size // right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            float32 = any(operand.dtype == jnp.float32 for operand in (left, right))
            yield Product(2 * times * size * int(inner), looped, float32)
        repeated = times * equation.params["length"] if name == "scan" else times
        for part in jaxprs_in_params(equation.params):
            yield from _products(part, repeated, looped or name == "while")


def flops(found: list[Product], *, looped: bool | None = None) -> int:
    """The sum, of all or of those inside or outside a `while`."""
    return sum(product.flops for product in found if looped in (None, product.looped))


def size(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device can do: `product`, FLOPs a second; `copy`, bytes a second, read and written."""

    product: float
    copy: float

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for work that computes and moves at once."""
        return max(operations / self.product, moved / self.copy)


def training_floor(machine: Machine, operations: float, trained: int) -> float:
    """Seconds of a step: its products, then AdamW, which reads parameter, gradient and two moments and writes three of
    them, 4 bytes each."""
    return operations / machine.product + 28 * trained / machine.copy


def captioning_floor(
    machine: Machine, model: ClipCap, found: list[Product], pictures: int, beams: int, tokens: int
) -> float:
    """Seconds of a search: reading the prefixes, then `tokens - 1` times GPT-2's parameters, the keys and values."""
    config = model.config
    width = jnp.dtype(config.dtype).itemsize
    read = size(param_shapes(model)["gpt2"]) - config.gpt2.positions * config.gpt2.width
    start = machine.seconds(flops(found, looped=False), size(param_shapes(model)) * width)
    step = flops(found, looped=True)
    for generated in range(1, tokens):
        kept = 2 * pictures * (config.mapper.prefix_length + generated * beams) * config.gpt2.layers * config.gpt2.width
        start += machine.seconds(step, (read + kept) * width)
    return start
