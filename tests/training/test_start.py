from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from original import load_clip
from rich.console import Console
from safetensors.numpy import save_file
from tiny import make_config

from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.config import Config
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training.start import check_same_run, choose_tokenizer, load_pretrained

QUIET = Console(quiet=True)


def test_a_pretrained_tower(data_dir: Path, tmp_path: Path) -> None:
    _, params, arrays = load_clip("vit")
    state = {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, tmp_path / "tower.safetensors")
    sizes = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "heads": 2, "embedding_width": 24}
    changes: dict[str, Any] = {f"model.clip.{name}": value for name, value in sizes.items()}
    changes |= {"train.pretrained.clip": str(tmp_path / "tower.safetensors"), "train.trainable": ("mapper", "gpt2")}
    config = make_config(data_dir, changes, "pixels")
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(config, QUIET), {"clip": params})


def test_two_sources_of_one_part(data_dir: Path) -> None:
    changes = {"train.pretrained.gpt2": "gpt2", "tokenizer.source": "gpt2", "train.init_from": "runs/other"}
    config = make_config(data_dir, changes)
    with pytest.raises(UserError, match=r"config.train.init_from and config.train.pretrained.gpt2 are both set"):
        load_pretrained(config, QUIET)


def metadata(config: Config, tokenizer: Tokenizer) -> Metadata:
    return Metadata(config, tokenizer, encoder="", embedding_width=5)


def test_a_base_brings_its_tokenizer(data_dir: Path, tmp_path: Path) -> None:
    zebras = Tokenizer.train(["one zebra", "two zebras"], 270)
    (tmp_path / "tokenizer.json").write_text(zebras.to_dict()["tokenizer_json"])
    base = metadata(make_config(data_dir), Tokenizer.load(str(tmp_path)))
    captions: list[tuple[str, ...]] = [("a picture of a house",)]
    assert choose_tokenizer(make_config(data_dir), base, captions) is base.tokenizer
    alone = choose_tokenizer(make_config(data_dir), None, captions)
    assert alone.to_dict() == Tokenizer.train(["a picture of a house"], 320).to_dict()

    from_folder = make_config(data_dir, {"tokenizer.source": str(tmp_path)})
    assert choose_tokenizer(from_folder, base, captions).to_dict() == base.tokenizer.to_dict()
    with pytest.raises(UserError, match="is not the one that the checkpoint was trained with"):
        choose_tokenizer(from_folder, metadata(from_folder, alone), captions)
    with pytest.raises(UserError, match=r"has \d+ pieces, more than config.model.gpt2.vocab_size=260"):
        choose_tokenizer(
            make_config(data_dir, {"tokenizer.source": str(tmp_path), "model.gpt2.vocab_size": 260}), None, []
        )


def test_a_tower_more_is_another_setting(data_dir: Path) -> None:
    pixels, embeddings = make_config(data_dir, variant="pixels"), make_config(data_dir)
    for now, then in ((pixels, embeddings), (embeddings, pixels)):
        with pytest.raises(UserError, match=r"config\.model\.clip(\.width)? was "):
            check_same_run(now, then)


@pytest.mark.parametrize(
    "changes", [{"evaluate.images": 2}, {"evaluate.decode.beam_size": 5}, {"evaluate.words": "spaces"}]
)
def test_scores_of_a_run_can_be_compared(data_dir: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        check_same_run(make_config(data_dir, changes), make_config(data_dir))


@pytest.mark.parametrize(
    "changes",
    [
        {"data.workers": 0},
        {"train.log_every": 7},
        {"data.data_dir": "elsewhere"},
        {"evaluate.every": 100, "evaluate.batch_size": 8},
        {"checkpoint.every": 1, "checkpoint.keep": 1},
        {"parallel.layout": "fsdp", "train.remat": True},
    ],
)
def test_settings_that_change_nothing_that_is_learnt(data_dir: Path, changes: dict[str, Any]) -> None:
    check_same_run(make_config(data_dir, changes), make_config(data_dir))
