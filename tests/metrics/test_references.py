import importlib.util
import json
import stat
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import References, meteor
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
    assert scores.not_computed == {"METEOR": "not asked for"}
    for name in JAVA_FREE:
        assert scores.overall[name] == pytest.approx(COCO_100["overall"][name], rel=1e-9)
        assert scores.per_image[name] == pytest.approx(per_image(name), rel=1e-9)
    assert references.score(CAPTIONS) == scores  # nothing is used up


@pytest.mark.java
@pytest.mark.usefixtures("java")
def test_meteor_of_100_images_is_the_stored_one() -> None:
    scores = References(REFERENCES).score(CAPTIONS, meteor=True)
    assert not scores.not_computed
    assert list(scores.overall) == list(COCO_100["overall"])
    assert scores.overall["METEOR"] == pytest.approx(COCO_100["overall"]["METEOR"], rel=1e-9)
    assert scores.per_image["METEOR"] == pytest.approx(per_image("METEOR"), rel=1e-9)


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_meteor_takes_blank_and_odd_captions() -> None:
    references = References({"1": ["a cat sat", "a dog"], "2": ["a big dog runs", ""], "3": ['<a b="|||"> é']})
    scores = references.score({"1": "", "2": "the dog runs ||| x", "3": "é 😀 http://\ud800é"}, meteor=True)
    assert not scores.not_computed
    assert scores.per_image["METEOR"]["1"] == 0
    assert 0 < scores.per_image["METEOR"]["2"] < 1
    assert 0 < scores.per_image["METEOR"]["3"] < 1


def test_the_order_of_the_captions_does_not_matter() -> None:
    scores = References(REFERENCES).score(dict(reversed(CAPTIONS.items())))
    assert scores == References(REFERENCES).score(CAPTIONS)


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


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `java` on the PATH for a test to write; METEOR's jar counts as there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(meteor, "_find_jar", lambda: Path("meteor.jar"))
    program = tmp_path / "java"
    program.touch()
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def why_no_meteor() -> str:
    scores = References({"1": ["a dog"], "2": ["a cat"]}).score({"1": "a dog", "2": "a cat"}, meteor=True)
    assert list(scores.overall) == JAVA_FREE
    assert "METEOR" not in scores.per_image
    return scores.not_computed["METEOR"]


def test_without_java_meteor_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no `java` on the PATH" in why_no_meteor()


def test_without_the_package_meteor_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "_find_java", lambda: "java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "clipcap_jax[java]"' in why_no_meteor()


def test_a_failing_program_is_quoted(fake_java: Path) -> None:
    fake_java.write_text("#!/bin/sh\necho Could not reserve enough space >&2\necho >&2\nexit 1\n")
    assert why_no_meteor() == "METEOR's Java program failed: Could not reserve enough space"


def test_a_program_that_answers_nonsense_has_failed(fake_java: Path) -> None:
    fake_java.write_text("#!/bin/sh\nwhile read line; do echo nonsense; done\n")
    assert why_no_meteor() == "METEOR's Java program failed: it ended without a message"


def test_a_hanging_program_is_stopped(fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "_START_SECONDS", 0.2)
    fake_java.write_text("#!/bin/sh\nexec sleep 60\n")
    start = time.monotonic()
    assert "was stopped after" in why_no_meteor()
    assert time.monotonic() - start < 30


def test_an_interrupt_leaves_no_program_behind(fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[subprocess.Popen[str]] = []

    def interrupted(program: subprocess.Popen[str], *_: object) -> None:
        programs.append(program)
        raise KeyboardInterrupt

    monkeypatch.setattr(meteor, "_converse", interrupted)
    fake_java.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(KeyboardInterrupt):
        why_no_meteor()
    assert programs[0].returncode is not None  # it has ended, and has been waited for


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
def test_published_meteor_of_blip2(shared: Path) -> None:
    references, captions, published = blip2(shared)
    scores = References(references).score(captions, meteor=True)
    assert scores.overall["METEOR"] == pytest.approx(published["METEOR"], abs=1e-9)


def viecap(shared: Path) -> tuple[References, dict[str, str]]:
    entries = json.loads((shared / "data" / "metrics" / "viecap_nocaps_in_domain" / "captions.json").read_text())
    assert len(entries) == 417
    references = References({entry["image_name"]: entry["captions"] for entry in entries})
    return references, {entry["image_name"]: entry["prediction"] for entry in entries}


def test_published_scores_of_viecap(shared: Path) -> None:
    references, captions = viecap(shared)
    scores = references.score(captions)
    published = {"Bleu_4": 0.287, "ROUGE_L": 0.494, "CIDEr": 0.592}
    assert {name: round(scores.overall[name], 3) for name in published} == published


def test_published_token_counts_of_viecap(shared: Path) -> None:
    references, captions = viecap(shared)
    lengths = [len(tokens.split()) for tokens in tokenize_all(list(captions.values()))]
    closest = [
        min(of_image, key=lambda reference: (abs(reference - length), reference))
        for length, of_image in zip(lengths, references._lengths, strict=True)
    ]
    assert (sum(lengths), sum(closest)) == (4_280, 4_220)


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_published_meteor_of_viecap(shared: Path) -> None:
    references, captions = viecap(shared)
    assert round(references.score(captions, meteor=True).overall["METEOR"], 3) == 0.228
