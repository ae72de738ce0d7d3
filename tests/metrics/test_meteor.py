import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipcap_jax.metrics import References, java, meteor
from clipcap_jax.metrics.java import Unavailable

COCO_100 = json.loads((Path(__file__).parents[1] / "data" / "metrics" / "coco_100.json").read_text("utf-8"))


@pytest.mark.java
@pytest.mark.usefixtures("java")
def test_meteor_of_100_images_is_the_stored_one() -> None:
    images = COCO_100["images"]
    references = References({image: entry["references"] for image, entry in images.items()})
    scores = references.score({image: entry["caption"] for image, entry in images.items()}, meteor=True)
    assert "METEOR" not in scores.not_computed
    assert scores.overall["METEOR"] == pytest.approx(COCO_100["overall"]["METEOR"], rel=1e-12)
    expected = {image: entry["scores"]["METEOR"] for image, entry in images.items()}
    assert scores.per_image["METEOR"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_meteor_takes_blank_and_odd_captions() -> None:
    references = References({"1": ["a cat sat", "a dog"], "2": ["a big dog runs", ""], "3": ['<a b="|||"> é']})
    scores = references.score({"1": "", "2": "the dog runs ||| x", "3": "é 😀 http://\ud800é"}, meteor=True)
    assert scores.per_image["METEOR"]["1"] == 0
    assert 0 < scores.per_image["METEOR"]["2"] < 1
    assert 0 < scores.per_image["METEOR"]["3"] < 1


def counts(*fields: float) -> str:
    return " ".join(map(str, fields))


@pytest.fixture
def jar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "pycocoevalcap", lambda *_: Path("meteor.jar"))


@pytest.mark.usefixtures("jar")
def test_the_formula_by_hand(fake_java: Callable[[str], Path]) -> None:
    # Nine words each, three of them function words; four content and two function words match, in two chunks.
    half = counts(9, 9, 3, 3, 4, 4, 2, 2, *[0] * 12, 2, 6, 6)
    whole = counts(3, 3, 1, 1, 2, 2, 1, 1, *[0] * 12, 1, 3, 3)
    none = counts(1, 2, 0, 1, *[0] * 19)
    fake_java(f"cat >/dev/null; printf '%s\\n' '{half}' '{whole}' '{none}'")
    measure = meteor.meteor(["a", "b", "c"], [["a"], ["b"], ["c"]])
    share = (0.75 * 4 + 0.25 * 2) / (0.75 * 6 + 0.25 * 3)
    np.testing.assert_allclose(measure.per_image, [share * (1 - 0.6 * (2 / 6) ** 0.2), 1, 0])
    # Of all together, the words of the second count, but not its one chunk.
    precision = (3.5 + 1.75) / (5.25 + 1.75 + 0.75)
    recall = (3.5 + 1.75) / (5.25 + 1.75 + 1.0)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert measure.overall == pytest.approx(mean * (1 - 0.6 * (2 / 9) ** 0.2))


@pytest.mark.usefixtures("jar")
@pytest.mark.parametrize("answer", ["nonsense", "1 2 3", ""])
def test_answers_that_make_no_sense(fake_java: Callable[[str], Path], answer: str) -> None:
    fake_java(f"cat >/dev/null; echo {answer}")
    with pytest.raises(Unavailable, match="gave 1 answers for 2 captions, the last one"):
        meteor.meteor(["a", "b"], [["a"], ["b"]])
