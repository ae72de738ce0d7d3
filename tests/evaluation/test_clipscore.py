import dataclasses
import io
import json
import math
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_files import CONFIG, in_hub_cache, text_params, write_clip, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from original import load_clip
from PIL import Image
from pytorch import import_torch, whole_clip
from tiny import assert_ended, in_process

from clipcap_jax import pictures
from clipcap_jax.errors import UserError
from clipcap_jax.evaluation.clipscore import ClipScorer, clip_scores
from clipcap_jax.models.clip_text import ClipText
from clipcap_jax.models.clip_vit import normalize_pixels
from clipcap_jax.models.clipcap import tower
from clipcap_jax.text.clip_tokenizer import ClipTokenizer

FLOAT32 = jnp.dtype("float32")
CAPTIONS = ["a dog", "", "two dogs and a cat", "a photo " * 50, "A DOG.", "it's a long way to go", "x"]
REFERENCES = [
    ["a dog"],
    ["", "nothing"],
    ["a", "two dogs", "cats"],
    ["a photo"] * 2,
    [],
    ["b"],
    ["a much longer one, of"],
]
NAMES = [f"{i}.png" for i in range(len(CAPTIONS))]


def picture(index: int) -> bytes:
    random = np.random.default_rng(index)
    buffer = io.BytesIO()
    # A colour each, or random towers give much the same embedding for all.
    pixels = random.integers(0, 255, (3,)) // 2 + random.integers(0, 128, (40, 33 + index, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer.load(str(folder))


def pictures_embeddings(count: int = len(CAPTIONS)) -> np.ndarray:
    config, params, _ = load_clip("vit")
    model = tower(config, FLOAT32)
    apply = jax.jit(lambda pixels: model.apply({"params": params}, normalize_pixels(pixels)))
    pixels = [pictures.preprocess(pictures.decode(picture(i)), config.image_size) for i in range(count)]
    return np.concatenate([apply(one[None]) for one in pixels])


@pytest.fixture(scope="module")
def embed_text(folder: Path) -> Callable[[str], np.ndarray]:
    """One text at a time, in 77 tokens."""
    model, params, tokenizer = ClipText(CONFIG, FLOAT32), text_params(), ClipTokenizer.load(str(folder))
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))

    def embed(text: str) -> np.ndarray:
        [ids] = tokenizer.encode([f"A photo depicts {text}"], 77)
        return np.asarray(apply(np.array([ids + [0] * (77 - len(ids))], np.int32))[0])

    return embed


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float), b.astype(float)
    return float(a @ b) / float(a @ a) ** 0.5 / float(b @ b) ** 0.5


def by_the_paper(seen: np.ndarray, caption: np.ndarray, references: Sequence[np.ndarray]) -> tuple[float, float]:
    """Its section 3, word for word."""
    score = 2.5 * max(cosine(caption, seen), 0)
    if not len(references):
        return score, math.nan
    best = max(max(cosine(caption, reference) for reference in references), 0)
    return score, statistics.harmonic_mean([score, best])


def expected_scores(seen: np.ndarray, embed_text: Callable[[str], np.ndarray]) -> np.ndarray:
    """Of all captions, `2 n`."""
    texts = zip(seen, CAPTIONS, REFERENCES, strict=True)
    return np.transpose([by_the_paper(one, embed_text(text), list(map(embed_text, many))) for one, text, many in texts])


@pytest.mark.parametrize("batch_size", [1, 5, 8, 100])
def test_pictures(scorer: ClipScorer, embed_text: Callable[[str], np.ndarray], batch_size: int) -> None:
    found = scorer.score(NAMES, picture, CAPTIONS, REFERENCES, batch_size=batch_size, workers=2)
    expected = expected_scores(pictures_embeddings(), embed_text)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert len(set(expected[0])) > 3
    assert np.isnan(found[1]).tolist() == [not of_picture for of_picture in REFERENCES]


def test_embeddings(scorer: ClipScorer, embed_text: Callable[[str], np.ndarray]) -> None:
    """With cosines of either sign; half precision, as `clipcap embed` stores it, and no unit length."""
    seen = np.random.default_rng(1).normal(0, 7, (len(CAPTIONS), 24)).astype(np.float16)
    found = scorer.score(NAMES, seen, CAPTIONS, REFERENCES)
    expected = expected_scores(seen, embed_text)
    assert 0 < sum(score == 0 for score in expected[0]) < len(CAPTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@given(arrays(np.int8, st.tuples(st.integers(2, 9), st.just(3)), elements=st.integers(-3, 3)), st.data())
def test_any_embeddings(vectors: np.ndarray, data: st.DataObject) -> None:
    """Whole numbers, so that cosines of just 0, 1 and -1 are among them."""
    vectors[~vectors.any(axis=1)] = 1
    count = len(vectors) // 2
    owners = data.draw(st.lists(st.integers(0, count - 1), max_size=9))
    chosen = data.draw(st.lists(st.integers(0, len(vectors) - 1), min_size=len(owners), max_size=len(owners)))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    of_owner = np.array(owners, int)
    score, with_references = clip_scores(unit[:count], unit[count : 2 * count], unit[chosen], of_owner)
    for i in range(count):
        references = [vectors[j] for j, owner in zip(chosen, owners, strict=True) if owner == i]
        expected = by_the_paper(vectors[i], vectors[count + i], references)
        np.testing.assert_allclose((score[i], with_references[i]), expected, atol=1e-7)


def test_the_limits_of_the_scores() -> None:
    e = np.eye(2)
    for picture, reference, expected in ((0, 0, (2.5, 10 / 7)), (0, 1, (2.5, 0)), (1, 0, (0, 0)), (1, 1, (0, 0))):
        found = clip_scores(e[[picture]], e[[0]], e[[reference]], np.array([0]))
        np.testing.assert_allclose(np.concatenate(found), expected)


def test_without_references(scorer: ClipScorer) -> None:
    score, with_references = scorer.score(NAMES, picture, CAPTIONS)
    np.testing.assert_array_equal(score, scorer.score(NAMES, picture, CAPTIONS, [[]] * len(CAPTIONS))[0])
    assert np.isnan(with_references).all()
    assert [len(scores) for scores in scorer.score([], picture, [])] == [0, 0]


def test_what_differs_only_beyond_77_tokens(scorer: ClipScorer) -> None:
    seen = np.ones((2, 24), np.float32)
    first, second = scorer.score(["a", "b"], seen, ["dog " * 80 + "cat", "dog " * 80 + "photo"])[0]
    assert first == pytest.approx(second, abs=1e-6)


def score_in_process(folder: str) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    scorer = ClipScorer.load(folder)
    return jax.device_count(), scorer.score(NAMES, picture, CAPTIONS, REFERENCES, batch_size=2, workers=1)


def test_one_device_gives_the_same_as_four(scorer: ClipScorer, folder: Path) -> None:
    devices, found = in_process(score_in_process, str(folder), devices=1)
    assert (devices, jax.device_count()) == (1, 4)
    for ours, theirs in zip(found, scorer.score(NAMES, picture, CAPTIONS, REFERENCES), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_equals_transformers(tmp_path: Path) -> None:
    """Hugging Face's files of a whole CLIP, tokenizer included, and its own embeddings of the same pixels."""
    torch = import_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTokenizer
    parts = write_tokenizer(tmp_path / "parts")
    merges = [tuple(line.split()) for line in (parts / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = CLIPTokenizer(vocab=json.loads((parts / "vocab.json").read_text()), merges=merges)
    size = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = whole_clip(
        {**size, "image_size": 32, "patch_size": 8},
        {**size, "vocab_size": CONFIG.vocab_size, "eos_token_id": 2},
        width=10,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")

    pixels = np.stack([pictures.preprocess(pictures.decode(picture(i)), 32) for i in range(len(CAPTIONS))])
    pixels = np.asarray(normalize_pixels(jnp.asarray(pixels))).transpose(0, 3, 1, 2)

    def embedded(texts: list[str]) -> Any:
        prompts = [f"A photo depicts {text}" for text in texts]
        ids = tokenizer(prompts, truncation=True, max_length=77, padding=True, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_text_features(**ids).pooler_output, dim=1)

    with torch.no_grad():
        seen = model.get_image_features(pixel_values=torch.from_numpy(pixels.copy())).pooler_output
        seen = torch.nn.functional.normalize(seen, dim=1)
        score = 2.5 * (seen * embedded(CAPTIONS)).sum(1).clip(0)
        best = [
            float((embedded(CAPTIONS)[i] @ embedded(texts).T).max()) if texts else np.nan
            for i, texts in enumerate(REFERENCES)
        ]
    found = ClipScorer.load(str(tmp_path / "clip")).score(NAMES, picture, CAPTIONS, REFERENCES, batch_size=4)
    np.testing.assert_allclose(found[0], score.numpy(), atol=1e-5)
    np.testing.assert_allclose(found[1], 2 * score.numpy() * best / (score.numpy() + best), atol=1e-5)


def broken(index: int) -> bytes:
    return picture(index)[:100] if index == 3 else picture(index)


def missing(index: int) -> bytes:
    return Path("no such folder/3.png").read_bytes() if index == 3 else picture(index)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (broken, r"^picture 3.png: The image is truncated or broken"),
        (missing, r"^picture 3.png cannot be read: No such file or directory$"),
        (np.zeros((7, 23), np.float32), r"have the shape \(7, 23\); of this CLIP and 7 pictures they have \(7, 24\)"),
        (np.zeros((6, 24), np.float32), r"have the shape \(6, 24\); of this CLIP"),
        (
            np.diag([1, 1, np.nan, 1, np.inf, 1, 1.0])[:, :1].repeat(24, axis=1),
            "embeddings are not finite or 0, the fir",
        ),
    ],
)
def test_pictures_that_cannot_be_scored(scorer: ClipScorer, pictures: Any, message: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=message):
        scorer.score(NAMES, pictures, CAPTIONS, batch_size=2, workers=2)
    assert_ended(before)


def test_lists_that_do_not_fit(scorer: ClipScorer) -> None:
    with pytest.raises(ValueError, match="7 names, 6 captions and 7 lists of references"):
        scorer.score(NAMES, picture, CAPTIONS[:6], REFERENCES)
    with pytest.raises(ValueError, match="7 names, 7 captions and 1 lists of references"):
        scorer.score(NAMES, picture, CAPTIONS, REFERENCES[:1])


def test_towers_and_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    vision, vision_params, _ = load_clip("vit")
    tokenizer = ClipTokenizer.load(str(folder))
    with pytest.raises(
        UserError, match="the towers are of different CLIPs: pictures' embeddings are 24 wide, texts' 25"
    ):
        ClipScorer(vision, vision_params, dataclasses.replace(CONFIG, embedding_width=25), text_params(), tokenizer)
    with pytest.raises(UserError, match=f"the tokenizer has {CONFIG.vocab_size} pieces, but the text tower 600"):
        ClipScorer(vision, vision_params, dataclasses.replace(CONFIG, vocab_size=600), text_params(), tokenizer)


def test_where_the_tokenizer_lies(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(UserError, match=f"no tokenizer of CLIP in {tmp_path}: {tmp_path} holds none of tokenizer.json"):
        ClipScorer.load(str(tmp_path / "weights.safetensors"))
    assert ClipScorer.load(str(tmp_path / "weights.safetensors"), str(folder)).text.vocab_size == CONFIG.vocab_size
    write_tokenizer(tmp_path)
    assert ClipScorer.load(str(tmp_path / "weights.safetensors")).text.vocab_size == CONFIG.vocab_size


def test_weights_and_tokenizer_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = write_clip(in_hub_cache(tmp_path, "a/clip"))
    for source in ("a/clip", f"a/clip@{snapshot.name}", str(snapshot)):
        assert ClipScorer.load(source).text == CONFIG
