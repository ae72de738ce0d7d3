import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import References, SpiceConfig, score_domains
from clipcap_jax.metrics import references as references_module
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.ptb import tokenize_all

COCO_100 = json.loads((Path(__file__).parents[1] / "data" / "metrics" / "coco_100.json").read_text("utf-8"))
REFERENCES: dict[str, list[str]] = {image: entry["references"] for image, entry in COCO_100["images"].items()}
CAPTIONS: dict[str, str] = {image: entry["caption"] for image, entry in COCO_100["images"].items()}
JAVA_FREE = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


def per_image(name: str) -> dict[str, float]:
    return {image: entry["scores"][name] for image, entry in COCO_100["images"].items()}


def test_scores_of_100_images_are_the_stored_ones() -> None:
    references = References(REFERENCES)
    assert len(references) == 100
    scores = references.score(CAPTIONS)
    assert list(scores.overall) == list(scores.per_image) == JAVA_FREE
    assert scores.not_computed == {"METEOR": "not asked for", "SPICE": "not asked for"}
    for name in JAVA_FREE:
        assert scores.overall[name] == pytest.approx(COCO_100["overall"][name], rel=1e-9)
        assert scores.per_image[name] == pytest.approx(per_image(name), rel=1e-9)
    assert references.score(CAPTIONS).per_image == scores.per_image  # nothing is used up


def test_java_scores_come_in_pycocoevalcaps_order(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = mean([0.0, 1.0])
    monkeypatch.setattr(references_module, "meteor_of", lambda captions, references: halves)
    monkeypatch.setattr(references_module, "spice_of", lambda captions, references, config: halves)
    references = References({"1": ["a dog"], "2": ["a cat"]})
    captions = {"2": "a cat", "1": "a dog"}
    scores = references.score(captions, meteor=True, spice=SpiceConfig(), plain_cider=True)
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "CIDEr_plain", "SPICE"]
    assert list(scores.overall) == list(scores.per_image) == names
    assert not scores.not_computed
    assert scores.overall["METEOR"] == 0.5
    assert scores.per_image["SPICE"] == {"1": 0.0, "2": 1.0}
    assert scores.add({"other": halves}).overall == {**scores.overall, "other": 0.5}


def test_a_program_that_is_not_there_leaves_the_other_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = References({"1": ["a dog"]}).score({"1": "a dog"}, meteor=True, spice=SpiceConfig())
    assert list(scores.overall) == JAVA_FREE
    assert "no `java` on the PATH" in scores.not_computed["METEOR"]
    assert "no `java` on the PATH" in scores.not_computed["SPICE"]


def test_domains_are_scored_alone() -> None:
    images = list(REFERENCES)
    domains = {image: ["in-domain", "out-domain", ""][i % 3] for i, image in enumerate(images)}
    whole = References(REFERENCES).score(CAPTIONS).add({"SPICE": mean(range(100))})
    found = score_domains(REFERENCES, CAPTIONS, domains, whole)
    assert list(found) == ["in-domain", "out-domain"]
    inside = images[::3]
    alone = References({image: REFERENCES[image] for image in inside}).score(
        {image: CAPTIONS[image] for image in inside}
    )
    assert found["in-domain"].images == tuple(inside)
    assert found["in-domain"].overall == {**alone.overall, "SPICE": np.mean(range(0, 100, 3))}
    assert found["in-domain"].per_image["CIDEr"] != {image: whole.per_image["CIDEr"][image] for image in inside}
    assert not score_domains(REFERENCES, CAPTIONS, {}, whole)
    assert list(score_domains(REFERENCES, CAPTIONS, {**domains, "not scored": "near-domain"}, whole)) == list(found)


def test_the_order_of_the_captions_does_not_matter() -> None:
    scores = References(REFERENCES).score(dict(reversed(CAPTIONS.items())))
    assert scores.per_image == References(REFERENCES).score(CAPTIONS).per_image


def test_a_blank_caption_scores_as_one_without_words() -> None:
    scores = References({"1": ["a dog"], "2": ["a cat"]}).score({"1": " .\n", "2": "a cat"})
    assert all(values["1"] == pytest.approx(0, abs=1e-6) for values in scores.per_image.values())
    assert all(value > 0 for value in scores.overall.values())


def test_captions_must_fit_the_references() -> None:
    references = References({str(image): ["a dog"] for image in range(5)})
    with pytest.raises(UserError, match=r"4 of 5 images have no caption \('1', '2', '3' and 1 more\)"):
        references.score({"0": "a dog"})
    with pytest.raises(UserError, match=r"1 captions are for images without references \('x.jpg'\)"):
        references.score({str(image): "a dog" for image in range(5)} | {"x.jpg": "a cat"})
    with pytest.raises(UserError, match=r"none of the 2 captions \('x.jpg', 'y.jpg'\).* another data set"):
        references.score({"x.jpg": "a cat", "y.jpg": "a dog"})
    with pytest.raises(UserError, match=r"1 captions are not strings \('3'\)"):
        references.score({str(image): "a dog" for image in range(5)} | {"3": float("nan")})  # type: ignore[arg-type]


def test_references_must_be_there_and_be_text() -> None:
    with pytest.raises(UserError, match="no image has references"):
        References({})
    with pytest.raises(UserError, match=r"1 image ids are not strings \(7\)"):
        References({7: ["a dog"]})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"list of strings for each image; 2 are not \('1', '2'\)"):
        References({"1": "a dog", "2": [None], "3": ["a dog"]})  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"2 images have no references, or only blank ones \('1', '2'\)"):
        References({"1": [], "2": ["", " \n"], "3": ["a dog", ""]})


def blip2(shared: Path) -> tuple[dict[str, list[str]], dict[str, str], dict[str, float]]:
    """5,000 captions of the Karpathy test split, their references and their published scores."""
    data = shared / "data"
    references: dict[str, list[str]] = defaultdict(list)
    for entry in json.loads((data / "coco_captions" / "coco_karpathy_test_gt.json").read_text())["annotations"]:
        references[str(entry["image_id"])].append(entry["caption"])
    folder = data / "metrics" / "blip2_coco_karpathy_test"
    captions = {
        str(entry["image_id"]): entry["caption"] for entry in json.loads((folder / "captions.json").read_text())
    }
    return references, captions, json.loads((folder / "evaluate.txt").read_text())["test"]


def test_published_scores_of_blip2(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Java
    references, captions, published = blip2(shared)
    assert (len(captions), sum(map(len, references.values()))) == (5_000, 25_010)
    scores = References(references).score(captions)
    for name in JAVA_FREE:
        assert scores.overall[name] == pytest.approx(published[name], abs=1e-9)


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_published_java_scores_of_blip2(shared: Path, tmp_path: Path) -> None:
    """SPICE takes 12 minutes on two cores."""
    references, captions, published = blip2(shared)
    spice = SpiceConfig(str(shared / "data" / "spice_jars"), cache=str(tmp_path))
    scores = References(references).score(captions, meteor=True, spice=spice)
    assert not scores.not_computed
    assert scores.overall["METEOR"] == pytest.approx(published["METEOR"], abs=1e-9)
    assert scores.overall["SPICE"] == pytest.approx(published["SPICE"], abs=1e-9)


def viecap(shared: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    entries = json.loads((shared / "data" / "metrics" / "viecap_nocaps_in_domain" / "captions.json").read_text())
    assert len(entries) == 417
    references = {entry["image_name"]: entry["captions"] for entry in entries}
    return references, {entry["image_name"]: entry["prediction"] for entry in entries}


def test_published_scores_of_viecap(shared: Path) -> None:
    references, captions = viecap(shared)
    scores = References(references).score(captions)
    published = {"Bleu_4": 0.287, "ROUGE_L": 0.494, "CIDEr": 0.592}
    assert {name: round(scores.overall[name], 3) for name in published} == published


def test_published_token_counts_of_viecap(shared: Path) -> None:
    references, captions = viecap(shared)

    def count(texts: Iterable[str]) -> list[int]:
        return [len(tokens.split()) for tokens in tokenize_all(list(texts))]

    lengths = count(captions.values())
    closest = [
        min(count(of_image), key=lambda reference: (abs(reference - length), reference))
        for length, of_image in zip(lengths, references.values(), strict=True)
    ]
    assert (sum(lengths), sum(closest)) == (4_280, 4_220)


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_published_java_scores_of_viecap(shared: Path, tmp_path: Path) -> None:
    references, captions = viecap(shared)
    spice = SpiceConfig(str(shared / "data" / "spice_jars"), cache=str(tmp_path))
    scores = References(references).score(captions, meteor=True, spice=spice)
    assert round(scores.overall["METEOR"], 3) == 0.228
    assert round(scores.overall["SPICE"], 3) == 0.099
