"""What may be given to `Captioner.caption`: the calls that people try."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import Source
from web import Web

import clipcap_jax
from clipcap_jax import pictures
from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.errors import UserError


@pytest.fixture(scope="module")
def captioner(pixels_run: Path) -> Any:
    return clipcap_jax.Captioner.load(pixels_run)


@pytest.fixture(scope="module")
def embeddings_captioner(embeddings_run: Path) -> Any:
    return Captioner.load(embeddings_run)


@pytest.fixture(scope="module")
def path(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of two colours that is larger than the model's."""
    path = tmp_path_factory.mktemp("pictures") / "two colours é.png"
    image = Image.new("RGB", (50, 40), "red")
    image.paste((20, 20, 200), (20, 0, 50, 40))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def expected(captioner: Any, path: Path) -> Caption:
    found: Caption = captioner.caption(path)
    return found


@pytest.fixture
def url(path: Path, web: Web) -> str:
    web.files["é picture.png"] = path.read_bytes()
    return web.url("é picture.png")


def test_one_picture_in_any_form(captioner: Any, path: Path, expected: Caption, url: str) -> None:
    with Image.open(path) as opened:
        image = opened.copy()
    forms = [str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), image, np.asarray(image), url]
    assert captioner.caption(forms, batch_size=4) == [expected] * len(forms)
    assert list(captioner.caption(iter([path, image, image]), stream=True)) == [expected] * 3
    for form in (str(path), path.read_bytes(), image, np.asarray(image), url):
        assert captioner.caption(form) == expected
    assert captioner.caption([str(path)]) == captioner.caption(np.asarray(image)[None]) == [expected]
    assert captioner.caption(np.array([str(path)])) == [expected]
    assert captioner(image) == expected
    assert str(expected) == expected.text
    preprocessed = pictures.preprocess(image.convert("RGB"), captioner.image_size)
    assert captioner.caption(preprocessed[None]) == [expected]
    with Image.open(path) as opened:  # read only now, and by two threads at once
        assert captioner.caption([opened, opened]) == [expected] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_pillow_pictures_of_any_mode_are_as_their_files(captioner: Any, path: Path, mode: str) -> None:
    image = Image.open(path).convert("L" if mode == "I;16" else mode).convert(mode)
    image.info["transparency"] = 0
    before = image.copy()
    captioner.caption(image)
    assert image == before
    assert image.info == before.info
    if mode in ("1", "L", "LA", "P", "RGBA"):
        del image.info["transparency"]
        stored = io.BytesIO()
        image.save(stored, "png")
        assert captioner.caption(image) == captioner.caption(stored.getvalue())


def test_a_pillow_picture_is_turned_as_its_file(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    Image.open(path).save(stored, "png", exif=exif)
    assert pictures.to_rgb(Image.open(stored)) == pictures.decode(stored.getvalue())
    assert pictures.to_rgb(Image.open(stored)).size == (40, 50)


def test_an_address_where_nobody_answers(captioner: Any) -> None:
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/a.png: cannot be fetched: .*refused"):
        captioner.caption("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "cannot caption a NoneType: give a path, an http"),
        (3, "cannot caption a int"),
        ([0.5, 0.25], r"input 0 \(counted from 0\): cannot caption a float"),
        ("a\0.png", "cannot be read: embedded null"),
        (".", "not a file, but a folder"),
        (b"text", "Not an image that can be read here"),
        (np.zeros((4, 5, 4), np.uint8), r"a picture is a uint8 array `H W 3`, not uint8 of the shape \(4, 5, 4\)"),
        (np.zeros((4, 5, 3)), "not float64 of the shape"),
        (np.zeros((0, 5, 3), np.uint8), "too thin|broken"),
        (np.zeros((4, 5), np.uint8), "cannot caption embeddings, as uint8"),
        (Image.new("RGB", (1, 500)), "too thin"),
    ],
)
def test_what_is_no_picture(captioner: Any, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        captioner.caption(given)


def test_embeddings_and_errors_in_their_place(embeddings_captioner: Any, source: Source) -> None:
    embeddings = np.load(source.embeddings)
    whole = embeddings_captioner.caption(embeddings)
    assert embeddings_captioner.caption(embeddings[3]).text == whole[3].text
    embeddings[1] = np.nan
    found = embeddings_captioner.caption(embeddings, errors="return")
    assert isinstance(found[1], UserError)
    assert [caption.text for caption in found[2:]] == [caption.text for caption in whole[2:]]


def test_streams_read_no_more_than_they_need(embeddings_captioner: Any, source: Source) -> None:
    embedding, taken = np.load(source.embeddings)[0], []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(1)
            yield embedding

    stream = embeddings_captioner.caption(endless(), stream=True, batch_size=4)
    assert isinstance(next(stream), Caption)
    assert len(taken) < 12
    stream.close()


def test_what_a_captioner_says_of_itself(captioner: Any, embeddings_captioner: Any, pixels_run: Path) -> None:
    assert repr(captioner).startswith("<Captioner of pictures of 16 x 16: mlp mapper, ")
    assert "embeddings of width 5 from mean colour: mlp mapper" in repr(embeddings_captioner)
    with pytest.raises(UserError, match=r"^published: for the original's \.pt files alone"):
        Captioner.load(pixels_run, published="coco-mlp")
    with pytest.raises(AttributeError, match="no attribute 'Captoiner'"):
        _ = clipcap_jax.Captoiner


def test_embeddings_beside_captions(captioner: Any, path: Path, expected: Caption) -> None:
    embedding = captioner.embed(path)
    caption, own = captioner.caption(path, embeddings=True)
    assert caption == expected
    np.testing.assert_array_equal(own, embedding)
    broken, ([best, _], own) = captioner.caption([b"text", path], n=2, embeddings=True, errors="return")
    assert isinstance(broken, UserError)
    assert best.text == captioner.caption(path, n=2)[0].text
    np.testing.assert_allclose(own, embedding, rtol=0, atol=1e-5)
