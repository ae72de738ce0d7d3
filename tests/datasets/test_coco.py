import functools
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import read

from clipcap_jax.datasets import coco, readers
from clipcap_jax.datasets.coco import coco_source
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import Source
from clipcap_jax.errors import UserError

# Captions of COCO's (CC BY 4.0), by number; the second has a line end and the first a space at its end.
CAPTIONS = {
    391895: ["A man with a red helmet on a small moped on a dirt road. ", "Man riding a motor bike on a dirt road."],
    184613: ["A child holding a flowered umbrella and petting a yak.", "A boy with an umbrella\nand a yak."],
    9: ["Closeup of bins of food that include broccoli and bread."],
    25: ["A giraffe eating food from the top of the tree.", "A giraffe, café ☕\tin the background."],
    42: ["This wire metal rack holds several pairs of shoes and sandals"],
}
SPLITS = {391895: "test", 184613: "val", 9: "train", 25: "train", 42: "restval"}
PARTS = {391895: "val2014", 184613: "val2014", 9: "train2014", 25: "train2014", 42: "val2014"}
KEYS = {("train" if split == "restval" else split, str(number)) for number, split in SPLITS.items()}


def image_name(number: int) -> str:
    return f"COCO_{PARTS[number]}_{number:012}.jpg"


def draw(folder: Path) -> None:
    for number, part in PARTS.items():
        (folder / part).mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (number % 256, 0, 0)).save(folder / part / image_name(number))


def karpathy() -> dict[str, Any]:
    images = [
        {
            "filepath": PARTS[number],
            "sentids": list(range(len(captions))),
            "filename": image_name(number),
            "imgid": index,
            "split": SPLITS[number],
            "sentences": [
                {"tokens": caption.split(), "raw": caption, "imgid": index, "sentid": place}
                for place, caption in enumerate(captions)
            ],
            "cocoid": number,
        }
        for index, (number, captions) in enumerate(CAPTIONS.items())
    ]
    return {"images": images, "dataset": "coco"}


def official(part: str) -> dict[str, Any]:
    numbers = [number for number in CAPTIONS if PARTS[number] == part]
    pairs = [(number, caption) for number in numbers for caption in CAPTIONS[number]]
    pairs.sort(key=lambda pair: CAPTIONS[pair[0]].index(pair[1]))  # the captions of a picture are apart
    return {
        "info": {"description": "COCO 2014 Dataset"},
        "images": [{"id": number, "file_name": image_name(number), "license": 5} for number in numbers],
        "annotations": [
            {"image_id": number, "id": index, "caption": caption} for index, (number, caption) in enumerate(pairs)
        ],
    }


def write_official(folder: Path) -> None:
    for part in ("train2014", "val2014"):
        (folder / f"captions_{part}.json").write_text(json.dumps(official(part)))
    for split, number in (("val", 184613), ("test", 391895)):
        line = f"{PARTS[number]}/{image_name(number)} {number}\n"
        (folder / f"karpathy_{split}_images.txt").write_text(line)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path)
    return tmp_path


def check(source: Source, folder: Path) -> None:
    examples, problems = read(source)
    assert problems == []
    assert examples.keys() == KEYS
    for number, captions in CAPTIONS.items():
        split = {"restval": "train"}.get(SPLITS[number], SPLITS[number])
        path = folder.resolve() / PARTS[number] / image_name(number)
        assert examples[split, str(number)] == Example(
            image=path.read_bytes(),
            embedding=None,
            image_path=os.path.relpath(path, source.root),
            image_id=str(number),
            captions=tuple(" ".join(caption.split()) for caption in captions),
            domain="",
        )


def test_karpathy_file(folder: Path) -> None:
    (folder / "dataset_coco.json").write_text(json.dumps(karpathy()))
    source = coco_source(folder)
    check(source, folder)
    assert (source.name, source.has_images) == ("coco", True)
    assert source.notes == [
        "this is not the COCO that was published: train 3 of 113,287, val 1 of 5,000, test 1 of 5,000"
    ]


def test_karpathy_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w") as archive:
        archive.writestr("__MACOSX/._dataset_coco.json", b"\0\1")
        archive.writestr("dataset_flickr8k.json", "{}")
        archive.writestr("dataset_coco.json", json.dumps(karpathy()))
    check(coco_source(folder), folder)


def test_a_zip_that_stands_for_more_than_memory_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LARGEST", 100_000)
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset_coco.json", " " * 100_001)
    with pytest.raises(
        UserError, match=r"dataset_coco.json has more than 100,000 bytes when unpacked: if it should, unpack it"
    ):
        coco_source(folder)


def test_a_damaged_zip_of_another_method(folder: Path) -> None:
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("dataset_coco.json", json.dumps(karpathy()))
    data = bytearray((folder / "caption_datasets.zip").read_bytes())
    start = data.index(b"dataset_coco.json") + len("dataset_coco.json")
    data[start + 4 : start + 9] = b"\xff" * 5  # what lzma is to do
    (folder / "caption_datasets.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"dataset_coco.json cannot be read: .* Copy or download"):
        coco_source(folder)


@pytest.mark.parametrize(
    "layout", ["{part}2017/{number:012}.jpg", "images/{number:012}.jpg", "COCO_{part}2014_{number:012}.jpg"]
)
@pytest.mark.parametrize("official", [False, True])
def test_pictures_in_other_layouts(folder: Path, layout: str, official: bool) -> None:
    """Of 2017, or all in one folder."""
    if official:
        write_official(folder)
    else:
        (folder / "dataset_coco.json").write_text(json.dumps(karpathy()))
    pictures = {}
    for number, part in PARTS.items():
        path = folder / layout.format(part=part.removesuffix("2014"), number=number)
        path.parent.mkdir(exist_ok=True)
        pictures[str(number)] = (folder / part / image_name(number)).rename(path)
    source = coco_source(folder)
    examples, problems = read(source)
    assert problems == []
    assert examples.keys() == KEYS
    for (_, image_id), example in examples.items():
        assert example.image == pictures[image_id].read_bytes()
        assert folder / example.image_path == pictures[image_id]
    assert source.notes[0] == "pictures found by their id or number under another name: 5"


def test_official_files_of_2017(folder: Path) -> None:
    """Other names, and a picture may be in another part than in 2014."""
    write_official(folder)
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in CAPTIONS]
    annotations = [{"image_id": number, "caption": text} for number, texts in CAPTIONS.items() for text in texts]
    for part, some in (("train2017", images[1:]), ("val2017", images[:1])):
        named = {image["id"] for image in some}
        content = {"images": some, "annotations": [entry for entry in annotations if entry["image_id"] in named]}
        (folder / f"captions_{part}.json").write_text(json.dumps(content))
        (folder / f"captions_{part.replace('2017', '2014')}.json").unlink()
    check(coco_source(folder), folder)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_official_files(folder: Path, zipped: bool, windows: bool) -> None:
    write_official(folder)
    if windows:
        for path in folder.glob("*.*"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    if zipped:
        with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as archive:
            for path in list(folder.glob("captions_*.json")):
                archive.write(path, f"annotations/{path.name}")
                path.unlink()
    check(coco_source(folder), folder)


def test_pictures_are_checked(folder: Path) -> None:
    (folder / "dataset_coco.json").write_text(json.dumps(karpathy()))
    (folder / PARTS[9] / image_name(9)).unlink()
    path = folder / PARTS[25] / image_name(25)
    path.write_bytes(path.read_bytes()[:-40])
    examples, problems = read(coco_source(folder))
    assert examples.keys() == {("test", "391895"), ("val", "184613"), ("train", "42")}
    assert sorted((problem.where, problem.reason) for problem in problems) == [
        ("dataset_coco.json: images[2]", "image missing"),
        ("dataset_coco.json: images[3]", "image broken"),
    ]


def karpathy_image(**changes: Any) -> dict[str, Any]:
    return karpathy()["images"][2] | changes


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (karpathy_image(), "duplicate image_id"),
        (karpathy_image(cocoid=10), "image under two ids"),
        (karpathy_image(cocoid=10, filename="x.jpg", sentences=[]), "no caption"),
        (karpathy_image(cocoid=10, filename="x.jpg", sentences=[{"raw": " \n\t"}]), "empty caption"),
        (karpathy_image(cocoid=10, filename="x.jpg", sentences=[{"raw": 5}]), "wrong type"),
        (karpathy_image(cocoid=10, filename="x.jpg", sentences=[{"raw": "\ud83d"}]), "broken text"),
        (karpathy_image(cocoid=10, filename="x.jpg", split="all"), "wrong split"),
        (karpathy_image(cocoid=10, filename=[7]), "wrong type"),
        (karpathy_image(cocoid="x1", filename="x.jpg"), "wrong id"),
        (karpathy_image(cocoid=None, filename="x.jpg"), "missing field"),
        ({}, "missing field"),
    ],
)
def test_bad_entries_are_named_and_the_rest_is_kept(folder: Path, image: dict[str, Any], reason: str) -> None:
    content = karpathy()
    content["images"].append(image)
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    examples, problems = read(coco_source(folder))
    assert [(problem.where, problem.reason) for problem in problems] == [("dataset_coco.json: images[5]", reason)]
    assert examples.keys() == KEYS


@pytest.mark.parametrize("last", [True, False])
def test_what_is_trained_on_is_not_tested_on(folder: Path, last: bool) -> None:
    content = karpathy()
    copy = content["images"][0] | {"split": "train"}
    content["images"].insert(5 if last else 0, copy)
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    examples, (problem,) = read(coco_source(folder))
    assert examples.keys() == KEYS
    assert problem.reason == "image in two splits"


def test_problems_in_official_files(folder: Path) -> None:
    write_official(folder)
    content = official("train2014")
    content["annotations"] = [{"image_id": 77, "caption": "A cat."}, {"image_id": 25, "caption": None}]
    content["annotations"].append({"image_id": 25})
    (folder / "captions_train2014.json").write_text(json.dumps(content))
    with (folder / "karpathy_val_images.txt").open("a") as file:
        file.write("val2014/COCO_val2014_000000000555.jpg 555\n")
    _, problems = read(coco_source(folder))
    assert [str(problem) for problem in problems] == [
        "captions_train2014.json: annotations[0]: caption of an unknown image: image_id 77",
        "captions_train2014.json: images[0]: no caption: image_id 9",
        "captions_train2014.json: images[1]: wrong type: 'caption' must be a text, 'captions' a list of texts",
        "karpathy_val_images.txt:2: listed image unknown: 555",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset_coco.json",
            json.dumps(karpathy() | {"dataset": "flickr8k"}),
            "not Karpathy's file of coco.*'flickr8k'",
        ),
        ("dataset_coco.json", json.dumps(official("val2014")), "not Karpathy's file of coco.*None"),
        ("dataset_coco.json", '{"dataset": "coco"}', "no list of objects 'images'"),
        ("dataset_coco.json", '{"dataset": "coco", "images": [1]}', "no list of objects 'images'"),
        ("dataset_coco.json", '{"dataset": "coco", "ima', "is not JSON"),
        ("dataset_coco.json", "[]", "holds no object"),
        ("captions_train2014.json", json.dumps(official("val2014")), "images.0.: 'COCO_val2014_.*not one of"),
        ("captions_val2014.json", json.dumps(karpathy()), "no list of objects 'annotations'"),
        ("karpathy_val_images.txt", "val2014/COCO_val2014_000000391895.jpg 391895", "test_images.txt:1: .*_val_images"),
        ("karpathy_val_images.txt", "a\n\nb", "karpathy_val_images.txt:1: 'a' does not end with"),
        ("annotations_trainval2014.zip", "PK", "is not a whole zip"),
    ],
)
def test_files_that_are_something_else(folder: Path, name: str, content: str, message: str) -> None:
    write_official(folder)
    if name.endswith(".zip"):
        (folder / "captions_val2014.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        coco_source(folder)


def test_not_utf8(folder: Path) -> None:
    write_official(folder)
    (folder / "karpathy_val_images.txt").write_bytes(b"\n\xff\n")
    with pytest.raises(UserError, match=r"karpathy_val_images.txt:2: not UTF-8"):
        coco_source(folder)


def test_what_is_missing_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)does not hold COCO Captions. Put there:.*dataset_coco.json.*http"):
        coco_source(folder)
    write_official(folder)
    (folder / "karpathy_test_images.txt").unlink()
    with pytest.raises(UserError, match="does not hold COCO Captions"):
        coco_source(folder)
    write_official(folder)
    shutil.rmtree(folder / "val2014")
    with pytest.raises(UserError, match="does not hold COCO's pictures of val2014"):
        coco_source(folder)


def test_wrong_splits_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(folder)
    monkeypatch.setattr(coco, "COUNTS", {"train": 2, "val": 2, "test": 1})
    with pytest.raises(UserError, match=r"splits of COCO are not.*train 3 of 2, val 1 of 2, test 1 of 1"):
        coco_source(folder)
    monkeypatch.setattr(coco, "COUNTS", {"train": 3, "val": 1, "test": 1})
    with pytest.raises(UserError, match="COCO's val split does not hold the pictures of Karpathy's"):
        coco_source(folder)


@pytest.mark.slow
def test_the_published_splits(shared: Path, tmp_path: Path) -> None:
    """With the real lists and captions of all of val and test, and invented pictures of train.

    Their membership is that of the lists, whether they are read or Karpathy's file, and exchanged lists are noticed.
    """
    real = shared / "data" / "coco_captions"
    listed: dict[str, dict[int, str]] = {}
    captions: dict[int, list[str]] = {}
    for split in ("val", "test"):
        lines = (real / f"karpathy_{split}_images.txt").read_text().splitlines()
        listed[split] = {int(line.split()[1]): line.split()[0] for line in lines}
        for annotation in json.loads((real / f"coco_karpathy_{split}_gt.json").read_text())["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    files = listed["val"] | listed["test"]
    train = [number for number in range(1, 130_000) if number not in files][:113_287]
    files |= {number: f"train2014/COCO_train2014_{number:012}.jpg" for number in train}
    captions |= {number: [f"Picture {number}."] for number in train}
    for part in ("train2014", "val2014"):
        (tmp_path / part).mkdir()
        numbers = [number for number, file in files.items() if file.startswith(part)]
        content = {
            "images": [{"id": number, "file_name": files[number].split("/")[1]} for number in numbers],
            "annotations": [{"image_id": number, "caption": text} for number in numbers for text in captions[number]],
        }
        (tmp_path / f"captions_{part}.json").write_text(json.dumps(content))
    for split in ("val", "test"):
        name = f"karpathy_{split}_images.txt"
        (tmp_path / name).write_bytes((real / name).read_bytes())
    images = [
        {
            "filepath": Path(name).parent.name,
            "filename": Path(name).name,
            "cocoid": number,
            "split": next((split for split in listed if number in listed[split]), ("train", "restval")[number % 2]),
            "sentences": [{"raw": text} for text in captions[number]],
        }
        for number, name in files.items()
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    check_published(coco_source(tmp_path), listed, captions)
    (tmp_path / "dataset_coco.json").unlink()
    check_published(coco_source(tmp_path), listed, captions)

    (tmp_path / "karpathy_val_images.txt").rename(tmp_path / "x")
    (tmp_path / "karpathy_test_images.txt").rename(tmp_path / "karpathy_val_images.txt")
    (tmp_path / "x").rename(tmp_path / "karpathy_test_images.txt")
    with pytest.raises(UserError, match="Are the lists exchanged"):
        coco_source(tmp_path)


def check_published(source: Source, listed: dict[str, dict[int, str]], captions: dict[int, list[str]]) -> None:
    assert (source.problems, source.notes) == ([], [])
    ids: dict[str, dict[int, Any]] = {"train": {}, "val": {}, "test": {}}
    for shard in source.parts:
        assert isinstance(shard.read, functools.partial)
        ids[shard.split] |= {int(record.image_id): record for record in shard.read.args[0]}
    assert {split: len(records) for split, records in ids.items()} == coco.COUNTS
    for split in ("val", "test"):
        assert ids[split].keys() == listed[split].keys()
        for number, record in ids[split].items():
            assert record.image == listed[split][number]
            assert record.captions == [" ".join(caption.split()) for caption in captions[number]]
