import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from original import load_clip
from rich.console import Console
from safetensors.numpy import save_file
from tiny import make_config, named

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
    # The same, as another version of transformers puts it down.
    stored = base.tokenizer.to_dict()
    other = Tokenizer.from_dict(
        {**stored, "tokenizer_json": stored["tokenizer_json"].replace('"trim_offsets":true', '"trim_offsets":false')}
    )
    assert other.to_dict() != stored
    elsewhere = make_config(data_dir, {"tokenizer.source": "elsewhere"})
    assert choose_tokenizer(from_folder, metadata(from_folder, other), captions).to_dict() == stored
    assert choose_tokenizer(elsewhere, metadata(elsewhere, other), captions) is other  # which may be nowhere by now
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


def replaced(settings: Any, path: str, value: Any) -> Any:
    """The same settings but for the one at a path such as "train.seed"."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(settings, **{name: replaced(getattr(settings, name), rest, value) if rest else value})


def test_what_may_change_when_a_run_goes_on(data_dir: Path) -> None:
    """Nothing but its length that changes what is learnt, or that CIDEr is not comparable."""
    config = make_config(data_dir)
    paths = [path for path in named(dataclasses.asdict(config)) if not path.startswith("train.trainable.")]
    free, told = set(), []
    for path in [*paths, "model.clip", "train.trainable"]:
        try:
            check_same_run(replaced(config, path, "another"), config)
            free.add(path)
        except UserError as error:
            told.append(f"config.{path} was " in str(error))
    assert len(told) > 40
    assert all(told)
    assert free == {
        "data.data_dir",
        "data.workers",
        "train.epochs",
        "train.remat",
        "train.log_every",
        "parallel.layout",
        "evaluate.every",
        "evaluate.batch_size",
        "checkpoint.every",
        "checkpoint.keep",
    }
