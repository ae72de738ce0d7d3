"""The demo: a captioner of drawings, trained from their pixels in a few minutes on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.data = dict(
        name="shapes",
        data_dir="data",
        input="image",
        max_tokens=24,
        pool_batches=20,
        workers=2,
    )
    config.tokenizer = dict(source="captions")
    config.model = dict(
        clip=dict(image_size=48, patch_size=16, width=128, layers=4, heads=4, embedding_width=256),
        mapper=dict(kind="mlp", prefix_length=4, clip_length=4, layers=1, heads=4, dropout=0.0),
        gpt2=dict(vocab_size=384, positions=32, width=128, layers=2, heads=4, dropout=0.0, word_dropout=0.0),
        normalize_embedding=False,
        dtype="float32",
        matmul_precision="default",
    )
    config.optimizer = dict(
        learning_rate=5e-4,
        warmup_steps=200,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        clip_norm=1.0,
        average_decay=0.0,
    )
    config.train = dict(
        seed=0,
        epochs=1.4,
        batch_size=64,
        trainable=("clip", "mapper", "gpt2"),
        pretrained=dict(clip="", gpt2=""),
        init_from="",
        targets="all",
        label_smoothing=0.0,
        accumulation=1,
        remat=False,
        gradient_dtype="float32",
        log_every=50,
    )
    config.parallel = dict(layout="data")
    config.evaluate = dict(
        every=1100,
        images=200,
        words="ptb",
        batch_size=100,
        decode=dict(beam_size=5, max_tokens=24, length_penalty=1.0, stop=""),
    )
    config.checkpoint = dict(every=1100, keep=1)
    return config
