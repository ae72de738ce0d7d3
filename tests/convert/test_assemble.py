"""From the original's file and a tower to captions, with a tokenizer and sizes that are small but as the original's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from original import Original, load_clip
from PIL import Image
from pytorch import import_torch, save
from safetensors.numpy import save_file

from clipcap_jax import __main__
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.convert.assemble import PUBLISHED, Published, from_original
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["mlp", "transformer"])
def original(request: pytest.FixtureRequest) -> Original:
    return Original.load(request.param)


@pytest.fixture
def tokenizer(original: Original, tmp_path: Path) -> Path:
    """Ids 0 to 96 are words; the one at which the original stopped is "."."""
    stop = original.sizes["stop_token"]
    words = {f"w{i}": i for i in range(97)} | {".": stop}
    del words[f"w{stop}"]
    words = {"<|endoftext|>" if i == 96 else word: i for word, i in words.items()}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    stored = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 96,
                "content": "<|endoftext|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def heads(original: Original) -> dict[str, int]:
    return {"mapper_heads": original.sizes.get("num_heads", 8), "gpt2_heads": original.sizes["n_head"]}


def text(ids: list[int], stop: int) -> str:
    return " ".join("." if i == stop else f"w{i}" for i in ids if i != 96)


def test_captions_are_the_originals(original: Original, tokenizer: Path, tmp_path: Path) -> None:
    """Beam search with the original's stop token, as text."""
    state, sizes = original.state, original.sizes
    positions = "gpt.transformer.wpe.weight"
    state[positions] = state[positions][:64]  # fewer than the 67 tokens that the original writes at most
    path = save(state, tmp_path / "model.pt")
    published = Published("", "ViT-B/32", normalize_embedding=False)
    metadata, params = from_original(path, published, str(tokenizer), **heads(original))
    decode = metadata.config.evaluate.decode
    assert (decode.beam_size, decode.stop) == (sizes["beam_size"], ".")
    assert decode.max_tokens == 64 - sizes["prefix_length"]
    captioner = Captioner(metadata, params, 0).with_decode(
        type(decode)(sizes["beam_size"], sizes["entry_length"], 1.0, ".")
    )
    captions = [caption.text for caption in captioner.caption(original.arrays["clip_embedding"], batch_size=4)]
    expected = [text(found["beams"][0], sizes["stop_token"]) for found in sizes["generation"]]
    assert captions == expected
    assert any(caption.endswith(" .") for caption in captions)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["clipcap", *map(str, arguments)])
    try:
        __main__.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def with_tower(original: Original, tmp_path: Path) -> tuple[Path, Path]:
    """The original's file, its first layer as wide as the small tower's embeddings; and the tower's."""
    _, _, arrays = load_clip("vit")
    tower = {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")}
    save_file({name: np.ascontiguousarray(value) for name, value in tower.items()}, tmp_path / "tower.safetensors")
    state = original.state
    first = "clip_project.model.0.weight" if original.sizes["mapping_type"] == "mlp" else "clip_project.linear.weight"
    state[first] = np.random.default_rng(0).normal(size=(len(state[first]), 24)).astype(np.float32)
    return save(state, tmp_path / "model.pt"), tmp_path / "tower.safetensors"


def test_one_command_captions_pictures(
    original: Original,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tower = with_tower(original, tmp_path)
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{i}.png")
    sizes = original.sizes
    options = ["--published", "coco-mlp", "--clip", tower, "--tokenizer", tokenizer]
    options += ["--mapper-heads", sizes.get("num_heads", 8), "--gpt2-heads", sizes["n_head"]]
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    output = tmp_path / "captions.jsonl"
    assert run(monkeypatch, "caption", model, *pictures, "--output", output, *options) == 0
    direct = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["image"]) for row in direct] == pictures
    assert all(row["caption"] for row in direct)

    said: Any = {"published": "coco-mlp", "clip": str(tower), "tokenizer": str(tokenizer), **heads(original)}
    captioner = Captioner.load(model, **said)
    assert [caption.text for caption in captioner.caption(pictures)] == [row["caption"] for row in direct]

    folder, anew = tmp_path / "run", ("--output", output, "--overwrite")
    assert run(monkeypatch, "convert", "from-original", model, folder, *options) == 0
    assert run(monkeypatch, "caption", folder, *pictures, *anew) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == direct

    assert run(monkeypatch, "convert", "to-original", folder, tmp_path / "again.pt") == 0
    assert run(monkeypatch, "caption", tmp_path / "again.pt", *pictures, *anew, *options) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == direct
    assert run(monkeypatch, "convert", "to-gpt2", folder, tmp_path / "gpt2") == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "gpt2").iterdir()} == names
    assert "Error" not in capsys.readouterr().err

    # What is there already is left as it is, and so is what has no use for an option.
    assert run(monkeypatch, "convert", "from-original", model, folder, *options) == 2
    assert "is there already: name another folder" in capsys.readouterr().err.replace("\n", " ")
    assert run(monkeypatch, "caption", folder, *pictures, "--published", "coco-mlp") == 2
    assert "--published: for the original's .pt files alone" in capsys.readouterr().err.replace("\n", " ")


def test_a_tower_that_does_not_fit(original: Original, tokenizer: Path, tmp_path: Path) -> None:
    _, tower = with_tower(original, tmp_path)
    path = save(original.state, tmp_path / "model.pt")
    published = Published(str(tower), "", normalize_embedding=False)
    with pytest.raises(UserError, match=r"reads embeddings of width 16, and .*tower.safetensors makes them 24 wide"):
        from_original(path, published, str(tokenizer), **heads(original))


def test_a_tokenizer_that_does_not_fit(original: Original, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    folder.mkdir()
    stored = Tokenizer.train(["a dog"], 270).to_dict()
    (folder / "tokenizer.json").write_text(stored["tokenizer_json"])
    path = save(original.state, tmp_path / "model.pt")
    published = Published("", "", normalize_embedding=False)
    with pytest.raises(UserError, match=r"has more pieces than .* has embeddings: it is not its tokenizer"):
        from_original(path, published, str(folder), **heads(original))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "does not say which CLIP it was trained with"),
        (["--published", "coco-mlp", "--normalize"], "normalize is known of published checkpoints: leave it out"),
        (["--published", "coco"], "published is 'coco': it can be coco-mlp, conceptual-mlp, coco-transformer"),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model.pt").write_bytes(b"anything")
    (tmp_path / "0.png").write_bytes(b"anything")
    assert run(monkeypatch, "caption", tmp_path / "model.pt", tmp_path / "0.png", *options) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_published_checkpoints() -> None:
    """DESIGN: both MLPs ViT-B/32, not normalised; the transformer RN50x4, normalised."""
    assert {name: (one.encoder, one.normalize_embedding) for name, one in PUBLISHED.items()} == {
        "coco-mlp": ("ViT-B/32", False),
        "conceptual-mlp": ("ViT-B/32", False),
        "coco-transformer": ("RN50x4", True),
    }


def test_training_does_not_go_on_in_converted_weights(
    original: Original, tokenizer: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torch()
    from rich.console import Console
    from tiny import make_config

    from clipcap_jax.training import loop

    options = ["--clip", "none", "--tokenizer", tokenizer, "--mapper-heads", original.sizes.get("num_heads", 8)]
    options += ["--gpt2-heads", original.sizes["n_head"]]
    path = save(original.state, tmp_path / "model.pt")
    assert run(monkeypatch, "convert", "from-original", path, tmp_path / "run", *options) == 0
    with pytest.raises(UserError, match="holds converted weights, not a run: give another --workdir"):
        loop.train(make_config(data_dir), tmp_path / "run", Console(quiet=True))


def test_a_hostile_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_torch()
    state = Original.load("mlp").state
    state["clip_project.model.0.bias"] = state["clip_project.model.0.bias"] * np.nan
    path = save(state, tmp_path / "model.pt")
    options = ["--clip", "none", "--gpt2-heads", 4]
    assert run(monkeypatch, "convert", "from-original", path, tmp_path / "run", *options) == 2
    assert "model.0.bias holds values that are not finite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
