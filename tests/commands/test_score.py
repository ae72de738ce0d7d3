import json
import re
from pathlib import Path
from typing import Any

import pytest
from clip_files import write_clip
from PIL import Image
from tiny import Clipcap

from clipcap_jax.evaluation.clipscore import ClipScorer
from clipcap_jax.metrics import References, coco_files, submission

COCO_100 = json.loads((Path(__file__).parents[1] / "data" / "metrics" / "coco_100.json").read_text("utf-8"))
IMAGES: dict[str, Any] = dict(list(COCO_100["images"].items())[:30])
CAPTIONS = {image: entry["caption"] for image, entry in IMAGES.items()}
REFERENCES = {image: entry["references"] for image, entry in IMAGES.items()}
DOMAINS = ("in-domain", "near-domain", "out-domain")


def write_results(path: Path, captions: dict[str, str]) -> Path:
    coco_files.write_results(path, captions)
    return path


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write_results(tmp_path / "captions.json", CAPTIONS)


def write_references(path: Path, *, domains: bool = False) -> Path:
    images: list[dict[str, Any]] = [{"id": int(image), "file_name": f"{image}.png"} for image in IMAGES]
    if domains:
        images = [{**image, "domain": DOMAINS[i % 3]} for i, image in enumerate(images)]
    annotations = [{"image_id": int(image), "caption": text} for image, texts in REFERENCES.items() for text in texts]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return write_references(tmp_path / "references.json")


def test_scores_as_json(
    clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clipcap("score", captions, references, "--output", tmp_path / "scores.json") == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    expected = References(REFERENCES).score(CAPTIONS).overall
    assert report["scores"] == expected
    assert report["not_computed"] == {"METEOR": "not asked for", "SPICE": "not asked for"}
    assert set(report["intervals"]) == set(expected)
    assert report["health"]["captions"] == 30
    printed = capsys.readouterr().out
    for name, score in expected.items():
        assert re.search(rf"{name}\W+{score:.4f}", printed)
    assert f"written: {tmp_path / 'scores.json'}" in printed


def test_markdown_and_a_page_with_pictures(clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path) -> None:
    first = next(iter(IMAGES))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / f"{first}.png")
    outputs = (tmp_path / "scores.md", tmp_path / "page.html")
    options = [option for output in outputs for option in ("--output", output)]
    assert clipcap("score", captions, references, *options, "--images", tmp_path / "photos", "--paper", "coco") == 0
    table = outputs[0].read_text()
    assert f"| CIDEr | {References(REFERENCES).score(CAPTIONS).overall['CIDEr']:.4f} |" in table
    assert "| paper: transformer | 1.1308 |" in table
    page = outputs[1].read_text()
    assert page.count("data:image/png") == 1
    assert page.count("There is no picture at") == 29
    assert page.count("<figure") == 30


def test_nocaps_domains_in_one_go(clipcap: Clipcap, captions: Path, tmp_path: Path) -> None:
    references = write_references(tmp_path / "nocaps.json", domains=True)
    output = tmp_path / "scores.json"
    assert clipcap("score", captions, references, "--paper", "nocaps", "--plain-cider", "--output", output) == 0
    report = json.loads(output.read_text())
    assert {name: part["pictures"] for name, part in report["domains"].items()} == dict.fromkeys(DOMAINS, 10)
    near = list(IMAGES)[1::3]
    alone = References({image: REFERENCES[image] for image in near})
    expected = alone.score({image: CAPTIONS[image] for image in near}, plain_cider=True).overall
    assert report["domains"]["near-domain"]["scores"] == expected


def test_two_captioners_are_compared(
    clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = {image: text.rpartition(" ")[0] for image, text in CAPTIONS.items()}
    coco_files.write_results(tmp_path / "worse.json", worse)
    output = tmp_path / "scores.json"
    arguments = ("--compare", tmp_path / "worse.json", "--output", output)
    assert clipcap("score", captions, references, *arguments) == 0
    report, scorer = json.loads(output.read_text()), References(REFERENCES)
    better = scorer.score(CAPTIONS).overall["CIDEr"] - scorer.score(worse).overall["CIDEr"]
    assert report["differences"]["CIDEr"]["value"] == pytest.approx(better)
    assert report["baseline"] == scorer.score(worse).overall
    assert 0 < report["differences"]["CIDEr"]["p"] < 0.05
    assert f"{better:+.4f}" in capsys.readouterr().out


def test_references_without_captions_can_be_left_out(
    clipcap: Clipcap, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = dict(list(CAPTIONS.items())[:20])
    coco_files.write_results(tmp_path / "part.json", part)
    assert clipcap("score", tmp_path / "part.json", references) == 2
    message = capsys.readouterr().err
    assert "10 of 30 images have no caption" in message
    assert "--only-captioned leaves out" in message
    output = tmp_path / "scores.json"
    assert clipcap("score", tmp_path / "part.json", references, "--only-captioned", "--output", output) == 0
    expected = References({image: REFERENCES[image] for image in part}).score(part).overall
    assert json.loads(output.read_text())["scores"] == expected
    options = ("--compare", write_results(tmp_path / "all.json", CAPTIONS), "--overwrite")  # of more images
    assert clipcap("score", tmp_path / "part.json", references, "--only-captioned", *options, "--output", output) == 0
    assert json.loads(output.read_text())["differences"]["CIDEr"]["value"] == 0


def test_a_domain_without_captions_is_left_out(clipcap: Clipcap, tmp_path: Path) -> None:
    references, output = write_references(tmp_path / "nocaps.json", domains=True), tmp_path / "scores.json"
    captions = write_results(tmp_path / "part.json", {image: CAPTIONS[image] for image in list(IMAGES)[::3]})
    assert clipcap("score", captions, references, "--only-captioned", "--output", output) == 0
    assert list(json.loads(output.read_text())["domains"]) == ["in-domain"]


def test_clipscore(clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path) -> None:
    weights, photos, output = write_clip(tmp_path / "clip"), tmp_path / "photos", tmp_path / "scores.json"
    photos.mkdir()
    for i, image in enumerate(IMAGES):
        Image.new("RGB", (40, 40), (8 * i, 255 - 8 * i, 100)).save(photos / f"{image}.png")
    arguments = ("score", captions, references, "--clipscore", weights, "--compare", captions, "--output", output)
    assert clipcap(*arguments, "--images", photos) == 0
    report = json.loads(output.read_text())
    assert report["differences"]["CLIPScore"]["value"] == 0
    scored, with_references = ClipScorer.load(str(weights)).score(
        list(IMAGES),
        lambda i: (photos / f"{list(IMAGES)[i]}.png").read_bytes(),
        list(CAPTIONS.values()),
        list(REFERENCES.values()),
    )
    assert report["scores"]["CLIPScore"] == pytest.approx(scored.mean())
    assert report["scores"]["RefCLIPScore"] == pytest.approx(with_references.mean())


def test_clipscore_needs_every_picture(
    clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, photos = write_clip(tmp_path / "clip"), tmp_path / "photos"
    arguments = ("score", captions, references, "--clipscore", weights)
    assert clipcap(*arguments) == 2
    assert "name them with --images" in capsys.readouterr().err
    photos.mkdir()
    Image.new("RGB", (40, 40)).save(photos / f"{next(iter(IMAGES))}.png")
    assert clipcap(*arguments, "--images", photos) == 2
    assert f"29 of 30 pictures are not there: {photos / list(IMAGES)[1]}.png" in capsys.readouterr().err


def test_java_that_is_not_there_is_told(
    clipcap: Clipcap,
    captions: Path,
    references: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "scores.json"
    assert clipcap("score", captions, references, "--meteor", "--spice", "--output", output) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("METEOR will not be computed: METEOR is a Java program")  # before the other scores
    assert "SPICE will not be computed" in printed
    report = json.loads(output.read_text())
    assert {"METEOR", "SPICE"} == set(report["not_computed"])
    assert all("install a Java runtime" in reason for reason in report["not_computed"].values())


def test_mistakes(
    clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco_files.write_results(tmp_path / "other.json", {"1": "a dog"})
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty.json").write_text('{"annotations": []}')
    coco_files.write_results(tmp_path / "extra.json", {**CAPTIONS, "1": "a dog"})
    for arguments, message in (
        ((references, captions), "is a file of references"),
        ((captions, captions), "Are the files exchanged?"),
        ((tmp_path / "other.json", references), "they are of another data set"),
        ((tmp_path / "other.json", references, "--only-captioned"), "no caption of"),
        ((tmp_path / "extra.json", references), "1 captions are for images without references ('1')"),
        ((captions, references, "--compare", tmp_path / "other.json"), "other.json: none of the 1 captions"),
        ((captions, references, "--output", "scores.txt"), "has to end in .json, .md, .html"),
        ((captions, references, "--output", tmp_path / "gone" / "scores.json"), "cannot be written"),
        ((captions, references, "--images", tmp_path / "gone"), "30 of 30 pictures are not there"),
        ((captions, references, "--output", captions), "is one of the files to read"),
        ((captions, references, "--output", tmp_path / "folder.json"), "is a folder: name another file"),
        ((captions, references, "--output", tmp_path / "empty.json"), "empty.json is there already: name another file"),
        ((captions, references, "--spice-jars", tmp_path), "--spice-jars is --spice's"),
        ((captions, tmp_path / "empty.json"), "empty.json: there is nothing to score against"),
        ((captions, references, "--paper", "mscoco"), "invalid choice"),
    ):
        assert clipcap("score", *arguments) == 2, arguments
        printed = capsys.readouterr().err
        assert message in printed, arguments
        assert "Traceback" not in printed
        assert "--only-captioned leaves out" not in printed, arguments


def test_images_without_references_are_counted(clipcap: Clipcap, captions: Path, references: Path) -> None:
    content = json.loads(references.read_text())
    content["images"].append({"id": 1})
    references.write_text(json.dumps(content))
    output = captions.with_name("scores.json")
    assert clipcap("score", captions, references, "--output", output) == 0
    assert json.loads(output.read_text())["details"]["images without references"] == "1"


def test_submissions(
    clipcap: Clipcap,
    captions: Path,
    references: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(submission, "COUNTS", dict.fromkeys(submission.COUNTS, 30))
    files = (captions, references)
    assert clipcap("submit", "nocaps", "--test", *files, "--output", tmp_path / "results.json") == 0
    assert len(json.loads((tmp_path / "results.json").read_text())) == 30
    assert clipcap("submit", "coco", "--val", *files, "--test", *files, "--output", tmp_path / "results.zip") == 0
    assert (tmp_path / "results.zip").stat().st_size > 1000
    assert clipcap("submit", "coco", "--val", *files, "--output", tmp_path / "x.zip") == 2
    assert "give --val and --test" in capsys.readouterr().err
    assert clipcap("submit", "nocaps", "--output", tmp_path / "x.json") == 2
    both = ("--val", *files, "--test", *files)
    assert clipcap("submit", "coco", *both, "--name", "a/b", "--output", tmp_path / "x.zip") == 2
    assert "--name a/b cannot be part of a file's name" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


def test_names_that_are_no_utf8_or_look_like_markup(
    clipcap: Clipcap, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are shown and written, and lose no scores."""
    folder, name = tmp_path / "ph\udcff [bold]" / "[" / "x]", "lr[lr=1e-4].json"
    folder.mkdir(parents=True)
    captions = write_results(folder / "captions \udcff.json", CAPTIONS)
    outputs = [folder / name, folder / "scores.md", folder / "page.html"]
    options = [option for output in outputs for option in ("--output", output)]
    assert clipcap("score", captions, references, "--images", folder, *options) == 2
    assert "30 of 30 pictures are not there" in capsys.readouterr().err
    Image.new("RGB", (20, 20)).save(folder / f"{next(iter(IMAGES))}.png")
    assert clipcap("score", captions, references, "--images", folder, *options) == 0
    printed = capsys.readouterr().out
    assert rf"written: {tmp_path}/ph\udcff [bold]/[/x]/{name}" in printed
    details = json.loads(outputs[0].read_text("utf-8"))["details"]
    assert details["captions of"] == str(captions)
    assert rf"{tmp_path}/ph\udcff [bold]" in outputs[1].read_text("utf-8")
    assert f"{tmp_path}/ph? [bold]" in outputs[2].read_text("utf-8")


def test_words(clipcap: Clipcap, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"1": ["桌子上放着三个苹果"], "2": ["一只猫在窗边睡觉"], "3": ["孩子们在放风筝"]}
    annotations = [{"image_id": int(image), "caption": text} for image, [text] in texts.items()]
    references, output = tmp_path / "references.json", tmp_path / "scores.json"
    references.write_text(json.dumps({"annotations": annotations}))
    captions = write_results(tmp_path / "captions.json", {image: text[1:] for image, [text] in texts.items()})
    assert clipcap("score", captions, references) == 0
    printed = capsys.readouterr().out
    assert re.search(r"CIDEr\s+0.0000", printed)
    assert "note: The references are mostly in a script without spaces" in printed
    assert "words: ptb" in printed
    assert clipcap("score", captions, references, "--words", "characters", "--meteor", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "METEOR will not be computed: it knows English alone" in printed
    assert "script without spaces" not in printed
    report = json.loads(output.read_text())
    assert report["scores"]["CIDEr"] > 5
    assert report["health"]["words per caption"] == pytest.approx(7)
    assert report["details"]["words"] == "characters"


def test_texts_that_are_lists(clipcap: Clipcap, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another program; they are not taken for captions without a word."""
    references = tmp_path / "references.json"
    texts = [f"['a dog runs, {i}', 'a dog is [not] running']" for i in range(12)]
    references.write_text(
        json.dumps({"annotations": [{"image_id": i, "caption": text} for i, text in enumerate(texts)]})
    )
    captions = write_results(tmp_path / "captions.json", {str(i): f"[a dog] runs, {i}" for i in range(12)})
    lists = write_results(tmp_path / "lists.json", {str(i): f' ["a dog runs, {i}"]' for i in range(12)})
    assert clipcap("score", captions, references) == 0
    printed = capsys.readouterr().out
    assert "note: 12 references are the text of a list, such as \"['a dog runs, 0'" in printed
    assert "12 captions are" not in printed
    assert clipcap("score", lists, references) == 0
    assert "12 captions are the text of a list" in capsys.readouterr().out


def test_what_caption_writes_and_tables(
    clipcap: Clipcap, captions: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Give the scores of COCO's files: captions by paths are matched with ids, file names and COCO's numbers."""
    lines = [{"image": f"/photos/{image}.png", "caption": text, "score": -1.0} for image, text in CAPTIONS.items()]
    jsonl, table, own = tmp_path / "c.jsonl", tmp_path / "c.csv", tmp_path / "references.jsonl"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    coco = [f"/photos/COCO_val2014_{int(image):012}.jpg" for image in CAPTIONS]
    texts = zip(coco, CAPTIONS.values(), strict=True)
    table.write_text("image,caption,error\n" + "".join(f'{image},"{text}",\n' for image, text in texts))
    rows = [{"file_name": f"{image}.png", "text": text} for image, texts in REFERENCES.items() for text in texts]
    own.write_text("\n".join(map(json.dumps, rows)))
    expected = References(REFERENCES).score(CAPTIONS).overall
    output = tmp_path / "scores.json"
    for files in ((jsonl, references), (table, references), (jsonl, own), (captions, own)):
        assert clipcap("score", *files, "--output", output, "--overwrite") == 0
        assert json.loads(output.read_text())["scores"] == expected, files
    capsys.readouterr()
    for broken, line in ((jsonl, json.dumps({"image": "a.png", "error": "no picture"})), (table, "a.png,,no picture")):
        with broken.open("a") as file:
            file.write(line + "\n")
        assert clipcap("score", broken, references, "--output", output, "--overwrite") == 0
        assert json.loads(output.read_text())["scores"] == expected
        assert "1 picture could not be captioned" in capsys.readouterr().out
    with jsonl.open("a") as file:
        file.write(json.dumps({"image": f"/others/{next(iter(CAPTIONS))}.png", "caption": "a dog"}) + "\n")
    assert clipcap("score", jsonl, references) == 2
    assert "1 image with captions of several files" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("a: b")
    assert clipcap("score", tmp_path / "c.yaml", references) == 2
    assert "Captions are read from COCO's .json, and from .jsonl" in capsys.readouterr().err
    table.write_text("a,b\n1,2\n")
    assert clipcap("score", captions, table) == 2
    assert "the first row must name the columns" in capsys.readouterr().err
