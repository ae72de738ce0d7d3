import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipcap_jax.metrics import References, SpiceConfig, java, spice
from clipcap_jax.metrics.java import Unavailable
from clipcap_jax.metrics.ptb import tokenize_all

COCO_100 = json.loads((Path(__file__).parents[1] / "data" / "metrics" / "coco_100.json").read_text("utf-8"))
IMAGES = COCO_100["images"]
REFERENCES = {image: entry["references"] for image, entry in IMAGES.items()}
CAPTIONS = {image: entry["caption"] for image, entry in IMAGES.items()}


@pytest.fixture
def config(shared: Path, tmp_path: Path) -> SpiceConfig:
    return SpiceConfig(jars=str(shared / "data" / "spice_jars"), memory=4, cache=str(tmp_path / "cache"))


@pytest.mark.java
@pytest.mark.usefixtures("java")
def test_spice_of_100_images_is_the_stored_one(config: SpiceConfig) -> None:
    scores = References(REFERENCES).score(CAPTIONS, spice=config)
    assert "SPICE" not in scores.not_computed
    assert scores.overall["SPICE"] == pytest.approx(COCO_100["overall"]["SPICE"], rel=1e-9)
    expected = {image: entry["scores"]["SPICE"] for image, entry in IMAGES.items()}
    assert scores.per_image["SPICE"] == pytest.approx(expected, rel=1e-9)


def some(count: int) -> tuple[list[str], list[list[str]]]:
    images = list(IMAGES)[:count]
    return tokenize_all([CAPTIONS[i] for i in images]), [tokenize_all(REFERENCES[i]) for i in images]


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_captions_that_say_nothing_score_zero(config: SpiceConfig) -> None:
    measure = spice.spice(
        ["", "and of", "a caf\u00e9 \U0001f600 dog"], [["a dog"], ["and the of", ""], ["a dog"]], config
    )
    assert measure.per_image.tolist() == [0, 0, pytest.approx(2 / 3)]


_SCRIPT = """
import json, sys
from clipcap_jax.metrics import spice
captions, references, config = json.load(open(sys.argv[1]))
print(json.dumps(spice.spice(captions, references, spice.SpiceConfig(**config)).per_image.tolist()))
"""


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_the_cache_survives_crashes_and_two_at_once(config: SpiceConfig, tmp_path: Path) -> None:
    captions, references = some(40)
    expected = [IMAGES[image]["scores"]["SPICE"] for image in list(IMAGES)[:40]]
    work = tmp_path / "work.json"
    work.write_text(json.dumps([captions, references, vars(config)]))

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _SCRIPT, str(work)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    delays = random.Random(0)
    for _ in range(5):
        runs = [start(), start()]
        time.sleep(delays.uniform(3, 25))
        for run in runs:
            os.killpg(run.pid, signal.SIGKILL)  # Java too
            run.communicate()
    runs = [start(), start()]
    for run in runs:
        printed, _ = run.communicate(timeout=600)
        assert json.loads(printed) == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of the jars' names; pycocoevalcap's count as there."""
    monkeypatch.setattr(java, "pycocoevalcap", lambda *_: tmp_path / "spice")
    folder = tmp_path / "jars"
    folder.mkdir()
    for pattern in spice._JARS:
        (folder / pattern.replace("*", "-x")).touch()
    return folder


def test_missing_jars_are_named_with_their_places(fake_java: Callable[[str], Path], folder: Path) -> None:
    fake_java("")
    (folder / "stanford-corenlp-3.6.0-models-x.jar").unlink()
    (folder / "asm-9-x.jar").unlink()
    with pytest.raises(Unavailable) as error:
        spice.spice(["a"], [["a"]], SpiceConfig(jars=str(folder)))
    message = str(error.value)
    assert f"not in {folder}: stanford-corenlp-3.6.0-models.jar, asm-9.jar" in message
    assert "/edu/stanford/nlp/stanford-corenlp/3.6.0/stanford-corenlp-3.6.0-models.jar" in message
    assert "/org/ow2/asm/asm/9.8/asm-9.8.jar" in message
    assert "nashorn" not in message
    assert "--spice-jars" in message


def test_its_program_is_asked_for_what_the_config_says(
    fake_java: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    # Writes what it was given, and a score for the caption.
    script = f"""
printf '%s\\n' "$@" >{tmp_path}/arguments
while [ "$1" != edu.anu.spice.SpiceScorer ]; do shift; done
cp "$2" {tmp_path}/captions.json
echo '[{{"image_id": "0", "scores": {{"All": {{"f": 0.25}}}}}}]' >"$4"
"""
    fake_java(script)
    config = SpiceConfig(jars=str(folder), memory=3, threads=7, cache=str(tmp_path / "kept"))
    assert spice.spice(["a dog"], [["a cat", "the cat"]], config).overall == 0.25
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert "-Xmx3G" in arguments
    assert arguments[-2:] == ["-threads", "7"]
    assert arguments[arguments.index("-cache") + 1] == str(tmp_path / "kept")
    scratch = Path(arguments[arguments.index("-out") + 1]).parent
    assert not scratch.exists()  # nothing is left
    entries = json.loads((tmp_path / "captions.json").read_text())
    assert entries == [{"image_id": "0", "test": "a dog", "refs": ["a cat", "the cat"]}]


@pytest.mark.parametrize("answer", ["", "[]", '[{"image_id": "0", "scores": {"All": {"f": null}}}]'])
def test_answers_that_make_no_sense(
    fake_java: Callable[[str], Path], folder: Path, tmp_path: Path, answer: str
) -> None:
    fake_java(f"""
while [ "$1" != edu.anu.spice.SpiceScorer ]; do shift; done
echo '{answer}' >"$4"
""")
    with pytest.raises(Unavailable, match="wrote no scores, or not of all captions"):
        spice.spice(["a"], [["a"]], SpiceConfig(jars=str(folder), cache=str(tmp_path / "kept")))


def test_a_cache_that_cannot_be_made(fake_java: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    fake_java("")
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"SPICE's cache .*file/x cannot be made"):
        spice.spice(["a"], [["a"]], SpiceConfig(jars=str(folder), cache=str(tmp_path / "file" / "x")))
