import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Source

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.demo import results


@pytest.fixture(scope="module")
def captioner(pixels_run: Path) -> Captioner:
    return Captioner.load(pixels_run)


def test_probabilities_do_not_depend_on_the_length_penalty(captioner: Captioner, source: Source) -> None:
    """Without one, the score is the log-probability."""
    picture = source.pictures / "00.png"
    plain = {caption.text: caption.score for caption in captioner.caption(picture, n=5, length_penalty=0)}
    ranked = captioner.caption(picture, n=5, length_penalty=0.7)
    both = [caption for caption in ranked if caption.text in plain]
    assert len(both) > 2
    found = [results.log_prob(captioner, caption, 0.7) for caption in both]
    np.testing.assert_allclose(found, [plain[caption.text] for caption in both], rtol=1e-5)
    expected = np.exp([plain[caption.text] for caption in both])
    np.testing.assert_allclose(results.shares(found), expected / expected.sum(), rtol=1e-3)


def test_very_unlikely_captions() -> None:
    assert results.shares([-2000.0, -2000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_what_is_shown(captioner: Captioner, source: Source) -> None:
    asked: dict[str, Any] = {"n": 2, "temperature": 0.01, "seed": 0}
    shown = results.answer({"<one>": captioner, "two": captioner}, source.pictures / "00.png", asked)
    assert shown.count("<section>") == 2
    assert "<h2>&lt;one&gt;</h2>" in shown
    [caption] = {found.text for found in captioner.caption(source.pictures / "00.png", **asked)}
    assert shown.count(f"<td>{caption} <small>(2 times)</small></td><td>100.0%</td>") == 2
    assert results.answer({"one": captioner}, None, asked) == results.EMPTY


def test_what_cannot_be_read(captioner: Captioner, tmp_path: Path) -> None:
    (tmp_path / "broken{{1}}.png").write_bytes(b"{<$")
    shown = results.answer({"one": captioner}, tmp_path / "broken{{1}}.png", {"n": 1})
    alert = "Not an image that can be read here: it starts with b&#x27;&#123;&lt;&#36;&#x27;."
    assert f'<p class="clipcap-alert" role="alert">{alert}</p>' in shown
    assert "{" not in shown
