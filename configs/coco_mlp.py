"""The paper's first variant on COCO: an MLP mapper, and GPT-2 tuned with it (arXiv 2111.09734, section 4).

Reads CLIP's embeddings of COCO, which `clipcap prepare coco` and `clipcap embed coco` make. The tower that made them is
part of the run, so that it captions pictures too.
"""

from ml_collections import ConfigDict

from clipcap_jax.convert.gpt2 import OPENAI


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.data = dict(
        name="embeddings/coco",
        data_dir="data",
        input="embedding",
        max_tokens=68,
        pool_batches=50,
        workers=4,
    )
    config.tokenizer = dict(source=OPENAI)
    config.model = dict(
        clip="RN50x4",  # or "none", for embeddings that something else made
        mapper=dict(kind="mlp", prefix_length=10, clip_length=10, layers=8, heads=8, dropout=0.0),
        gpt2=dict(vocab_size=50257, positions=1024, width=768, layers=12, heads=12, dropout=0.1, word_dropout=0.0),
        normalize_embedding=False,
        dtype="bfloat16",
        matmul_precision="default",
    )
    config.optimizer = dict(
        learning_rate=2e-5,
        warmup_steps=5000,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-6,
        clip_norm=0.0,
        average_decay=0.0,
    )
    config.train = dict(
        seed=0,
        epochs=10.0,
        batch_size=40,
        trainable=("mapper", "gpt2"),
        pretrained=dict(clip="timm/resnet50x4_clip.openai", gpt2=OPENAI),
        init_from="",
        targets="all",
        label_smoothing=0.0,
        accumulation=1,
        remat=False,
        gradient_dtype="float32",
        log_every=100,
    )
    config.parallel = dict(layout="data")
    config.evaluate = dict(
        every=5000,
        images=1000,
        words="ptb",
        batch_size=64,
        decode=dict(beam_size=5, max_tokens=67, length_penalty=1.0, stop=""),
    )
    config.checkpoint = dict(every=5000, keep=1)
    return config
