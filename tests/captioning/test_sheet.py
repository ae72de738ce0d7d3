import html
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import IMAGE_SIZE, Source

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.errors import UserError
from clipcap_jax.pages import picture


@pytest.fixture(scope="module")
def reads_pixels(pixels_run: Path) -> Captioner:
    return Captioner.load(pixels_run)


def uri(array: np.ndarray) -> str | None:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return picture(buffer.getvalue(), "", "").uri


def test_a_notebook_shows_pictures_with_their_captions(reads_pixels: Captioner, source: Source, tmp_path: Path) -> None:
    good = [source.pictures / "00.png", source.pictures / "05.png"]
    (tmp_path / "<broken>.png").write_bytes(b"no picture")
    sheet = reads_pixels.show([good[0], tmp_path / "<broken>.png", good[1].read_bytes()])
    first, broken, second = sheet.captions
    assert [first, second] == reads_pixels.caption(good)
    assert isinstance(broken, UserError)
    shown = sheet._repr_html_()
    [frame] = re.findall(r'^<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>$', shown)  # nothing gets out of it
    page = html.unescape(frame)
    assert page == sheet.page
    for given, caption in zip(good, (first, second), strict=True):
        assert f'<img src="{uri(reads_pixels.reader(given))}" alt="{caption.text}"' in page
    assert '<p class="missing">Not an image that can be read here' in page
    assert "&lt;broken&gt;.png" in page
    assert page.count("<figure>") == 3
    assert "input 2 (counted from 0)" in page
    assert "iframe" not in repr(sheet)
    assert pickle.loads(pickle.dumps(sheet)).page == page


def test_one_picture_with_several_captions(reads_pixels: Captioner, source: Source) -> None:
    sheet = reads_pixels.show(source.pictures / "00.png", n=3, seed=1)
    [captions] = sheet.captions
    assert captions == reads_pixels.caption(source.pictures / "00.png", n=3, seed=1)
    assert sheet.page.count("<figure>") == 1
    assert sheet.page.count('<p class="caption">') == 3
    assert reads_pixels.show([]).captions == []


def test_embeddings_have_no_picture(embeddings_run: Path, source: Source) -> None:
    captioner = Captioner.load(embeddings_run)
    sheet = captioner.show(np.load(source.embeddings)[:2])
    assert sheet.captions == captioner.caption(np.load(source.embeddings)[:2])
    assert "<img" not in sheet.page
    with pytest.raises(UserError, match="not on pictures"):
        captioner.show(np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
