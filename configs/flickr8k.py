"""Flickr8k with a small GPT-2 from scratch, for two CPU cores: `flickr8k.py` reads stored embeddings (prepared as
"records/flickr8k"), `flickr8k.py:pixels` the JPEGs ("records/flickr8k_pixels")."""

from ml_collections import ConfigDict

from clipcap_jax.errors import UserError


def get_config(variant: str = "embeddings") -> ConfigDict:
    if variant not in ("embeddings", "pixels"):
        raise UserError(f"configs/flickr8k.py has no variant {variant!r}: it can be embeddings or pixels")
    config = ConfigDict()
    config.data = dict(
        name="records/flickr8k",
        data_dir="data",
        input="embedding",
        max_tokens=40,
        pool_batches=50,
        workers=1,
    )
    config.tokenizer = dict(source="captions")
    config.model = dict(
        clip="none",
        mapper=dict(kind="transformer", prefix_length=6, clip_length=6, layers=2, heads=4, dropout=0.4),
        gpt2=dict(vocab_size=3000, positions=64, width=256, layers=4, heads=4, dropout=0.1, word_dropout=0.35),
        normalize_embedding=False,
        dtype="float32",
        matmul_precision="default",
    )
    config.optimizer = dict(
        learning_rate=6e-4,
        warmup_steps=500,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        clip_norm=1.0,
        average_decay=0.9995,
    )
    config.train = dict(
        seed=0,
        epochs=16.0,
        batch_size=32,
        trainable=("mapper", "gpt2"),
        pretrained=dict(clip="", gpt2=""),
        init_from="",
        targets="all",
        label_smoothing=0.1,
        accumulation=1,
        remat=False,
        gradient_dtype="float32",
        log_every=100,
    )
    config.parallel = dict(layout="data")
    config.evaluate = dict(
        every=1876,
        images=1000,
        words="ptb",
        batch_size=100,
        decode=dict(beam_size=1, max_tokens=40, length_penalty=1.0, stop=""),
    )
    config.checkpoint = dict(every=938, keep=1)
    if variant == "pixels":
        config.data.name = "records/flickr8k_pixels"
        config.data.input = "image"
        del config.model.clip  # a text until now
        config.model.clip = dict(image_size=128, patch_size=32, width=256, layers=4, heads=4, embedding_width=512)
        config.model.mapper.kind = "mlp"
        config.model.mapper.dropout = 0.0
        config.model.gpt2.dropout = 0.2
        config.model.gpt2.word_dropout = 0.0
        config.optimizer.average_decay = 0.0
        config.train.epochs = 3.0
        config.train.trainable = ("clip", "mapper", "gpt2")
        config.evaluate.every = 938
        config.evaluate.images = 500
    return config
