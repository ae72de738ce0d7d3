import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import IMAGE_SIZE, Source

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.captioning.insight import Likelihood, nearest
from clipcap_jax.config import DecodeConfig
from clipcap_jax.datasets import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training.validation import LossMeter


@pytest.fixture(scope="module")
def reads_pixels(pixels_run: Path) -> Captioner:
    return Captioner.load(pixels_run)


@pytest.fixture(scope="module")
def reads_embeddings(embeddings_run: Path) -> Captioner:
    return Captioner.load(embeddings_run)


def test_embeddings_of_pictures(reads_pixels: Captioner, source: Source) -> None:
    paths = sorted(source.pictures.iterdir())[:6]
    images = np.stack([reads_pixels.reader(path) for path in paths])
    expected = reads_pixels.model.apply({"params": jax.device_get(reads_pixels.params)}, images, method="embed")
    found = reads_pixels.embed(map(str, paths), batch_size=4)
    assert found.shape == (6, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reads_pixels.embed(paths[2]), expected[2], rtol=1e-5, atol=1e-5)
    assert reads_pixels.embed([]).shape == (0, 8)


def test_embeddings_stay_as_they_are(reads_embeddings: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings).astype(np.float64)
    np.testing.assert_array_equal(reads_embeddings.embed(embeddings), embeddings.astype(np.float32), strict=True)
    np.testing.assert_array_equal(reads_embeddings.embed(embeddings[3]), embeddings[3].astype(np.float32), strict=True)


def test_prefixes(reads_embeddings: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)[:5]
    params = jax.device_get(reads_embeddings.params)
    expected = reads_embeddings.model.apply({"params": params}, embeddings, method="prefix")
    found = reads_embeddings.prefix(embeddings)
    assert found.shape == (5, 2, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reads_embeddings.prefix(embeddings[4]), expected[4], rtol=1e-5, atol=1e-5)


def test_a_picture_that_cannot_be_read_is_named(reads_pixels: Captioner, tmp_path: Path, source: Source) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for look in (reads_pixels.embed, reads_pixels.prefix):
        with pytest.raises(UserError, match=r"broken.png: Not an image"):
            look([source.pictures / "01.png", tmp_path / "broken.png"])
        with pytest.raises(UserError, match="workers is 0"):
            look([], workers=0)


def test_the_nearest_pieces() -> None:
    tokenizer = Tokenizer.train(["a cat"] * 9, 300)
    table = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)  # more rows than there are pieces
    [cat], [end] = tokenizer.encode(["a cat"], strip=False)[0][-1:], [tokenizer.end_id]
    prefix = np.stack([3 * table[cat], -2 * table[350], np.zeros(4, np.float32), 0.1 * table[end]])
    found = nearest(prefix, table, tokenizer, 3)
    assert [len(words) for words in found] == [3, 3, 3, 3]
    assert (found[0][0].text, found[3][0].text) == (" cat", "<|endoftext|>")
    assert found[0][0].similarity == pytest.approx(1, abs=1e-6)
    cosines = table[: tokenizer.size] @ prefix[1] / np.linalg.norm(table[: tokenizer.size], axis=1)
    highest = np.sort(cosines / np.linalg.norm(prefix[1]))[::-1][:3]
    np.testing.assert_allclose([word.similarity for word in found[1]], highest, rtol=1e-5)
    assert [word.similarity for word in found[2]] == [0, 0, 0]


def test_a_prefix_in_words(reads_pixels: Captioner, source: Source) -> None:
    words = reads_pixels.prefix_words(source.pictures / "00.png", n=4)
    assert [len(row) for row in words] == [4, 4]
    table = jax.device_get(reads_pixels.params)["gpt2"]["token_embeddings"]
    assert words == nearest(reads_pixels.prefix(source.pictures / "00.png"), table, reads_pixels.metadata.tokenizer, 4)
    for images in ([source.pictures / "00.png"], np.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)):
        with pytest.raises(UserError, match="one picture or embedding at a time"):
            reads_pixels.prefix_words(images)


def test_what_a_search_finds_is_as_likely_as_it_says(reads_embeddings: Captioner, source: Source) -> None:
    embedding = np.load(source.embeddings)[4]
    found = reads_embeddings.caption(embedding, n=5, length_penalty=0.5)
    scored = reads_embeddings.score(embedding, found, batch_size=2)
    finished = [i for i, caption in enumerate(found) if caption.finished]
    assert len(finished) > 1
    for i in finished:
        assert scored[i].text == found[i].text
        assert scored[i].log_likelihood / scored[i].tokens ** 0.5 == pytest.approx(found[i].score, rel=1e-4)
    alone = reads_embeddings.score(embedding, found[0].text)
    assert alone == dataclasses.replace(scored[0], log_likelihood=alone.log_likelihood)
    assert alone.log_likelihood == pytest.approx(scored[0].log_likelihood, rel=1e-5)
    assert alone.perplexity == pytest.approx(np.exp(-alone.log_likelihood / alone.tokens))


def test_a_whole_split_is_as_likely_as_its_loss_says(reads_pixels: Captioner, data_dir: Path) -> None:
    data = CaptionData(open_split("records/both", "test", str(data_dir)), IMAGE_SIZE)
    pairs = data.pairs(reads_pixels.metadata.tokenizer, 16)
    scored = [
        likelihood
        for image, captions in zip(data.inputs(np.arange(len(data))), data.captions, strict=True)
        for likelihood in reads_pixels.score(image, captions)
    ]
    loss = LossMeter(reads_pixels.model)(reads_pixels.params, data, pairs, 4)
    mean = -sum(one.log_likelihood for one in scored) / sum(one.tokens for one in scored)
    assert mean == pytest.approx(loss, rel=1e-5)


def test_captions_that_end_with_another_token(reads_embeddings: Captioner, source: Source) -> None:
    embedding = np.load(source.embeddings)[4]
    stops = reads_embeddings.with_decode(DecodeConfig(beam_size=1, max_tokens=16, length_penalty=1.0, stop="."))
    whole, cut = stops.score(embedding, ["red and only dim red.", "red and only dim red"])
    assert whole.tokens == cut.tokens + 1 == reads_embeddings.score(embedding, whole.text).tokens - 1
    assert whole.log_likelihood < cut.log_likelihood
    with pytest.raises(UserError, match="'' has 0 tokens"):
        stops.score(embedding, "")
    assert reads_embeddings.score(embedding, "").tokens == 1  # the end


def test_captions_that_cannot_be_scored(reads_embeddings: Captioner, source: Source) -> None:
    embeddings = np.load(source.embeddings)
    assert reads_embeddings.score(embeddings[0], []) == []
    longest = "!" * 21
    assert reads_embeddings.score(embeddings[0], longest).tokens == 22
    for captions, message in (
        ("x" * 100, "^'x{60}'... has 1"),
        ("a \udcff", r"^'a \\udcff' is no text"),
        (longest + "!", "has 23 tokens: this model scores 1 to 22"),
        ([1], "a caption is a text or a Caption, not a int"),
        (None, "a caption is a text or a Caption, not a NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            reads_embeddings.score(embeddings[0], captions)
    with pytest.raises(UserError, match="one picture or embedding at a time"):
        reads_embeddings.score(embeddings, "a cat")


def test_a_perplexity_beyond_the_numbers() -> None:
    assert Likelihood("", -1e6, 2).perplexity == np.inf
    assert Likelihood("", -2 * np.log(7), 2).perplexity == pytest.approx(7)
