import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from tiny import make_config

from clipcap_jax.commands.card import make_card


def card(**changes: Any) -> tuple[Any, str]:
    """Metadata and text of a card of a reader of pictures that was converted, without scores."""
    config = make_config(Path("data"), changes, "pixels")
    found = {
        "step": 0,
        "total_steps": 0,
        "config": dataclasses.asdict(config),
        "parameters": {"clip": 1_500_000},
        "encoder": "",
        "embedding_width": 8,
        "tokenizer_pieces": 300,
    }
    made = ModelCard(make_card("ann/pixels", found, {}, None))
    return made.data, made.text


def test_what_is_not_known() -> None:
    data, text = card()
    assert data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    for line in (
        'print(captioner.caption("picture.jpg").text)',
        "- clip: 1.50M parameters, trained; image_size 16,",
        "- Checkpoint: weights that were not trained here",
        "None are known of this checkpoint.",
        "No licence is given",
    ):
        assert line in text


def test_what_it_started_from(tmp_path: Path) -> None:
    sources = {"train.pretrained.clip": "timm/vit@v1", "train.pretrained.gpt2": "gpt2", "tokenizer.source": "gpt2"}
    assert card(**sources)[0].base_model == ["timm/vit", "gpt2"]
    assert card(**{"train.pretrained.clip": str(tmp_path)})[0].base_model is None
