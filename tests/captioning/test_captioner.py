import dataclasses
import errno
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from random_models import random_params
from tiny import EMBEDDING_WIDTH, ENCODER, IMAGE_SIZE, SPLITS, Source

from clipcap_jax import pictures
from clipcap_jax.captioning import inputs
from clipcap_jax.captioning.batches import BatchCaptioner, finite
from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.captioning.decode import beam_search
from clipcap_jax.config import Config, DecodeConfig
from clipcap_jax.datasets import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.training import loop

PICTURES = sum(SPLITS.values())


def loaded(run: Path, inputs: np.ndarray) -> Captioner:
    """A run's captioner with random parameters: nonsense, but another one for every picture."""
    trained = Captioner.load(run)
    params = random_params(trained.model, 1, inputs, np.zeros((1, 2), np.int32))
    return Captioner(trained.metadata, params, trained.step)


@pytest.fixture(scope="module")
def reads_pixels(pixels_run: Path) -> Captioner:
    return loaded(pixels_run, np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))


@pytest.fixture(scope="module")
def reads_embeddings(embeddings_run: Path) -> Captioner:
    return loaded(embeddings_run, np.zeros((1, EMBEDDING_WIDTH), np.float32))


def searched(captioner: Captioner, inputs: np.ndarray) -> list[str]:
    """Captions of all inputs in one piece, without the captioner's batches and devices."""
    metadata = captioner.metadata
    search = jax.jit(
        lambda params, inputs: beam_search(captioner.model, params, inputs, captioner.decode, metadata.tokenizer.end_id)
    )
    best = search(jax.device_get(captioner.params), inputs).tokens[:, 0]
    return [metadata.tokenizer.decode(tokens) for tokens in best]


def pixels(paths: list[Path]) -> np.ndarray:
    return np.stack([pictures.preprocess(pictures.decode(path.read_bytes()), IMAGE_SIZE) for path in paths])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_file_gets_its_own_caption(reads_pixels: Captioner, source: Source, batch_size: int) -> None:
    paths = sorted(source.pictures.iterdir(), reverse=True)
    texts = [caption.text for caption in reads_pixels.caption(paths, batch_size=batch_size, workers=2)]
    assert texts == searched(reads_pixels, pixels(paths))
    assert len(set(texts)) > 3  # otherwise any order would do


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_bad_file_costs_only_itself(reads_pixels: Captioner, source: Source, tmp_path: Path, batch_size: int) -> None:
    good = sorted(source.pictures.iterdir())[:3]
    truncated, text, missing = tmp_path / "truncated.png", tmp_path / "text.png", tmp_path / "missing.png"
    truncated.write_bytes(good[0].read_bytes()[:60])
    text.write_text("no picture")
    paths = [truncated, good[0], text, missing, good[1], good[2]]
    captions = reads_pixels.caption(paths, batch_size=batch_size, workers=2, errors="return")
    found = dict(zip(paths, captions, strict=True))
    assert [found[path].text for path in good] == searched(reads_pixels, pixels(good))
    for path, message in ((truncated, "truncated or broken"), (text, "Not an image"), (missing, "No such file")):
        assert isinstance(found[path], UserError)
        assert message in str(found[path])
    with pytest.raises(UserError, match=r"truncated.png: The image is truncated or broken"):
        reads_pixels.caption(paths)
    with pytest.raises(UserError, match=r"^input 1 \(counted from 0\): The image is empty"):
        reads_pixels.caption([good[0].read_bytes(), b""])


def test_no_files_give_no_captions(reads_pixels: Captioner) -> None:
    assert reads_pixels.caption([]) == []
    assert reads_pixels.caption(np.zeros((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)) == []
    assert list(reads_pixels.caption(iter([]), stream=True)) == []


def test_a_dead_disk_ends_captioning(reads_pixels: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> bytes:
        raise TimeoutError(errno.ETIMEDOUT, "the file system has not answered", str(path))

    monkeypatch.setattr(pictures, "read", read)
    with pytest.raises(UserError, match=r"has not answered: '.*a\.png'"):
        reads_pixels.caption([tmp_path / "a.png"], errors="return")


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_embeddings(reads_embeddings: Captioner, source: Source, batch_size: int) -> None:
    embeddings = np.load(source.embeddings)
    texts = [caption.text for caption in reads_embeddings.caption(embeddings, batch_size=batch_size)]
    assert texts == searched(reads_embeddings, embeddings)
    assert len(texts) == PICTURES
    assert len(set(texts)) > 3


def test_another_search_than_the_configs(reads_embeddings: Captioner, embeddings_run: Path, source: Source) -> None:
    embeddings = np.load(source.embeddings)
    decode = DecodeConfig(beam_size=3, max_tokens=4, length_penalty=0.5, stop="")
    captioner = reads_embeddings.with_decode(decode)
    captions = list(captioner.caption(embeddings))
    assert [caption.text for caption in captions] == searched(captioner, embeddings)
    assert not all(caption.finished for caption in captions)  # 4 tokens are not enough
    assert reads_embeddings.decode.beam_size == 1
    assert Captioner.load(embeddings_run, decode=decode).decode == decode
    too_long = reads_embeddings.with_decode(dataclasses.replace(decode, max_tokens=23))
    with pytest.raises(UserError, match="take up to 25 positions, but GPT-2 has 24"):
        list(too_long.caption(embeddings))


def test_one_picture_costs_no_whole_batch(
    reads_pixels: Captioner, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    best = BatchCaptioner.best

    def noted(self: BatchCaptioner, params: Any, inputs: np.ndarray, *others: Any) -> list[list[Caption]]:
        sizes.append(len(inputs))
        return best(self, params, inputs, *others)

    monkeypatch.setattr(BatchCaptioner, "best", noted)
    paths = sorted(source.pictures.iterdir())
    for count in (1, 5, 9):
        assert len(reads_pixels.caption(paths[:count], batch_size=8)) == count
        assert len(reads_pixels.caption(pixels(paths[:count]), batch_size=8)) == count
    assert sizes == [4, 4, 8, 8, 8, 8, 8, 8]  # on four devices; the last batch is as large as the others


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_a_split_is_captioned_in_order(reads_embeddings: Captioner, data_dir: Path, rows: int) -> None:
    data = CaptionData(open_split("records/both", "test", str(data_dir)), None)
    indices = np.array([5, 0, 3, 3, 1, 2][:rows])
    captions = list(reads_embeddings.generate.all(reads_embeddings.params, data, indices, batch_size=4))
    assert [caption.text for caption in captions] == searched(reads_embeddings, data.inputs(indices))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_embedding_does_for_its_picture(reads_pixels: Captioner, data_dir: Path, workers: int) -> None:
    data = CaptionData(open_split("records/both", "test", str(data_dir)), IMAGE_SIZE)
    indices, params = np.array([5, 0, 3, 1, 2]), reads_pixels.params
    embeddings = np.stack(list(reads_pixels.embedder.all(params, data, indices, 4, workers)))
    model = reads_pixels.model
    expected = model.apply({"params": jax.device_get(params)}, data.inputs(indices), method="embed")
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert searched(reads_pixels, embeddings) == searched(reads_pixels, data.inputs(indices))


def test_a_checkpoint_says_what_it_reads(reads_embeddings: Captioner, reads_pixels: Captioner) -> None:
    assert reads_embeddings.image_size is None
    assert reads_pixels.image_size == IMAGE_SIZE
    for picture in ("photo.jpg", [Path("photo.jpg")], np.zeros((1, 16, 16, 3), np.uint8), Image.new("L", (9, 9))):
        with pytest.raises(UserError, match=f"embeddings of width 5 from {ENCODER}, not on pictures"):
            reads_embeddings.caption(picture, errors="return")
    for embeddings in (np.zeros((1, 5), np.float32), np.zeros(5), [np.ones(5)]):
        with pytest.raises(UserError, match="cannot caption embeddings"):
            reads_pixels.caption(embeddings)
    with pytest.raises(UserError, match=r"have the shape \(1, 4\); .* width 5"):
        reads_embeddings.caption(np.zeros((1, 4), np.float32))


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        ("float32", [0, 0, np.nan, 0, 0]),
        ("float64", [1, 0, -np.inf, 0, 0]),
        ("float64", [1e300, 0, 0, 0, 0]),  # beyond float32
        ("float16", [0, 0, 0, 0, 0]),
        ("int64", [0, 0, 0, 0, 0]),
    ],
)
def test_embeddings_that_mean_nothing(
    reads_embeddings: Captioner, dtype: str, bad: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_CHECKED_AT_ONCE", 2)
    embeddings = np.ones((7, 5), dtype)
    embeddings[3] = embeddings[6] = bad
    with pytest.raises(UserError, match="2 embeddings are not finite in float32, or 0 everywhere, the first in row 3 "):
        reads_embeddings.caption(embeddings)


@pytest.mark.parametrize(
    "matrix",
    [
        np.array(1.0),
        np.full((2, 5), "1"),
        np.full((2, 5), 1j),
        np.ones((2, 5), bool),
        np.zeros((2, 5), "datetime64[s]"),
    ],
)
def test_what_is_no_matrix_of_numbers(reads_embeddings: Captioner, matrix: np.ndarray) -> None:
    with pytest.raises(UserError, match="no matrix of numbers, but "):
        reads_embeddings.caption(matrix)


def test_the_score_is_the_mean_log_probability(embeddings_run: Path, source: Source) -> None:
    captioner = Captioner.load(embeddings_run)
    [caption] = captioner.caption(np.load(source.embeddings)[:1])
    tokenizer = captioner.metadata.tokenizer
    [ids] = tokenizer.encode([caption.text])
    tokens = np.array([[*ids, tokenizer.end_id]], np.int32)
    params = jax.device_get(captioner.params)
    logits = captioner.model.apply({"params": params}, np.load(source.embeddings)[:1], tokens)
    logits = np.asarray(logits, np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert caption.finished
    assert caption.score == pytest.approx(log_probs[np.arange(len(tokens[0])), tokens[0]].mean(), rel=1e-5)


def test_a_score_that_is_not_finite_makes_no_caption(reads_embeddings: Captioner, source: Source) -> None:
    """But it costs no other caption; weights that are broken have none at all."""
    good, bad = Caption("a dog", True, -1.0), Caption("", True, float("nan"))
    assert finite([bad, good], None) == good
    assert finite([good, bad, good], 3) == [good, good]
    assert isinstance(finite([bad, bad], 2), UserError)
    broken = Captioner(reads_embeddings.metadata, jax.tree.map(lambda leaf: leaf * np.nan, reads_embeddings.params), 1)
    embeddings = np.load(source.embeddings)[:2]
    settings: list[dict[str, Any]] = [{}, {"seed": 1}, {"n": 2}]
    for asked in settings:
        found = broken.caption(embeddings, errors="return", **asked)
        assert all("no caption has a finite score" in str(error) for error in found)
        with pytest.raises(UserError, match=r"^input 0 \(counted from 0\): no caption has a finite score"):
            broken.caption(embeddings, **asked)
    with pytest.raises(UserError, match=r"^the input: no caption has a finite score"):
        broken.caption(embeddings[1])


def test_a_damaged_checkpoint_is_passed_over(
    embeddings_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest whole one captions, with a warning; but not instead of one that was named."""
    run = tmp_path / "run"
    shutil.copytree(embeddings_run, run)
    latest = Captioner.load(run, "latest").step
    shutil.rmtree(run / "checkpoints" / str(latest) / "params")
    assert not capsys.readouterr().err
    used = Captioner.load(run, "latest").step
    assert used < latest
    warning = " ".join(capsys.readouterr().err.split())
    assert f"Warning: the checkpoint {run}/checkpoints/{latest} is gone or not whole" in warning
    assert f"The one of step {used} is tried." in warning
    with pytest.raises(UserError, match=f"checkpoints/{latest} is gone or not whole"):
        Captioner.load(run, str(latest))


def test_the_documentation(
    pixels_run: Path, embeddings_run: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every piece of code in docs/python.md, one after the other."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(pixels_run)
    (tmp_path / "runs" / "flickr8k-mlp").symlink_to(embeddings_run)
    (tmp_path / "photos").mkdir()
    shutil.copy(source.pictures / "00.png", tmp_path / "one.png")
    shutil.copy(source.pictures / "01.png", tmp_path / "photos" / "two.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"")
    shutil.copy(source.embeddings, tmp_path / "embeddings.npy")
    (tmp_path / "captions.jsonl").write_text('{"image": "two.png", "caption": "green", "split": "train"}\n')
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 11
    monkeypatch.chdir(tmp_path)
    trained: list[Config] = []

    def train(config: Config, folder: Path, *_: Any) -> None:
        trained.append(config)
        shutil.copytree(pixels_run, folder)

    monkeypatch.setattr(loop, "train", train)
    told: list[str] = []
    names: dict[str, Any] = {"print": lambda *parts: told.append(" ".join(map(str, parts)))}
    exec("".join(blocks), names)
    assert "photos/broken.png: The image is empty: 0 bytes." in told
    best = [line for line in told if re.fullmatch(r"-?[\d.e-]+ .+", line)]
    assert len(best) == 5
    assert best[0].endswith(told[0])
    assert [(config.data.name, config.train.epochs) for config in trained] == [("records/mine", 3.0)]
    assert re.fullmatch(r"CIDEr \d\.\d+, loss \d\.\d+", told[-1])
