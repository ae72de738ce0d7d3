"""Some hundred pictures with captions of one's own: `finetune:RUN` goes on from a run's best checkpoint, and takes its
model, tokenizer and search; `finetune` alone starts from OpenAI's CLIP and GPT-2, with a new mapper between them."""

from ml_collections import ConfigDict

from clipcap_jax import config_files
from clipcap_jax.checkpoints import settings, store
from clipcap_jax.convert.gpt2 import OPENAI
from clipcap_jax.errors import UserError


def get_config(base: str = "") -> ConfigDict:
    config = ConfigDict()
    config.data = dict(
        name="records/mine",
        data_dir="data",
        input="image",
        max_tokens=40,
        pool_batches=50,
        workers=2,
    )
    config.tokenizer = dict(source=OPENAI)
    config.model = dict(
        clip="ViT-B/32",
        mapper=dict(kind="mlp", prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.1),
        gpt2=dict(vocab_size=50257, positions=1024, width=768, layers=12, heads=12, dropout=0.1, word_dropout=0.0),
        normalize_embedding=False,
        dtype="float32",
        matmul_precision="default",
    )
    config.optimizer = dict(
        learning_rate=1e-4,
        warmup_steps=20,  # of some hundred: 300 pictures of five captions are 47 an epoch
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
        average_decay=0.0,
    )
    config.train = dict(
        seed=0,
        epochs=10.0,
        batch_size=32,
        trainable=("mapper", "gpt2"),
        pretrained=dict(clip="timm/vit_base_patch32_clip_224.openai", gpt2=OPENAI),
        init_from=base,
        targets="all",
        label_smoothing=0.1,
        accumulation=1,
        remat=False,
        gradient_dtype="float32",
        log_every=10,
    )
    config.parallel = dict(layout="data")
    config.evaluate = dict(
        every=50,
        images=1000,
        words="ptb",
        batch_size=32,
        decode=dict(beam_size=5, max_tokens=40, length_penalty=1.0, stop=""),
    )
    config.checkpoint = dict(every=50, keep=1)
    if base:
        taken = _settings(base)
        config.data.input = "embedding" if taken.model.clip == "none" else "image"
        config.data.max_tokens = taken.data.max_tokens
        config.tokenizer = taken.tokenizer
        config.model = taken.model
        config.train.pretrained = dict(clip="", gpt2="")
        config.evaluate.words = taken.evaluate.words
        config.evaluate.decode = taken.evaluate.decode
        config.evaluate.decode.stop = ""  # the end token is learnt, also where the base's captions ended otherwise
    return config


def _settings(base: str) -> ConfigDict:
    """A run's settings."""
    run = store.run_folder(base)
    if not store.has_checkpoints(run) or (taken := settings.read(run)) is None:
        raise UserError(
            f"{base} is no run to start from: name the folder of one, as clipcap train makes it, clipcap pull of a "
            "captioner on the Hugging Face hub, or clipcap convert from-original of a .pt file"
        )
    return config_files.as_read(taken)
