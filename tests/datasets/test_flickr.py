import functools
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import read

from clipcap_jax.datasets import flickr
from clipcap_jax.datasets.flickr import flickr_source
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.source import Source
from clipcap_jax.errors import UserError

# Captions of Flickr8k's, by file name.
CAPTIONS = {
    "1000268201_693b08cb0e.jpg": [
        "A girl going into a wooden building .",
        "A little girl climbing into a  playhouse .",
    ],
    "1001773457_577c3a7d70.jpg": ["A black dog and a spotted dog are fighting", "Two dogs | one #2 dog | café ☕"],
    "1002674143_1b742ab4b8.jpg": ["A little girl covered in paint ."],
}
SPLITS = dict(zip(CAPTIONS, ("train", "val", "test"), strict=True))
LISTS = {"flickr8k": "Flickr_8k.{}Images.txt", "flickr30k": "karpathy_{}_images.txt"}
FOLDERS = {"flickr8k": "Flicker8k_Dataset", "flickr30k": "flickr30k-images"}
CAPTION_FILES = [
    ("flickr8k", "Flickr8k.token.txt"),
    ("flickr30k", "results_20130124.token"),
    ("flickr30k", "results.csv"),
]


def draw(folder: Path, place: str) -> None:
    (folder / place).mkdir(parents=True)
    for index, name in enumerate(CAPTIONS):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(folder / place / name)


def write_karpathy(folder: Path, dataset: str) -> None:
    images = [
        {
            "sentids": [],
            "imgid": index,
            "sentences": [{"tokens": caption.split(), "raw": caption, "sentid": 0} for caption in captions],
            "split": SPLITS[name],
            "filename": name,
        }
        for index, (name, captions) in enumerate(CAPTIONS.items())
    ]
    (folder / f"dataset_{dataset}.json").write_text(json.dumps({"images": images, "dataset": dataset}))


def write_official(folder: Path, dataset: str, captions_file: str) -> None:
    lines = []
    for name, captions in CAPTIONS.items():
        for number, caption in enumerate(captions):
            bars = captions_file == "results.csv"
            lines.append(f"{name}| {number}| {caption}" if bars else f"{name}#{number}\t{caption}")
    head = ["image_name| comment_number| comment"] if captions_file == "results.csv" else []
    (folder / captions_file).write_text("\n".join(head + lines) + "\n")
    for name, split in SPLITS.items():
        split = "dev" if (dataset, split) == ("flickr8k", "val") else split
        (folder / LISTS[dataset].format(split)).write_text(f"{name}\n")


def check(source: Source, place: Path) -> None:
    examples, problems = read(source)
    assert problems == []
    assert examples.keys() == {(split, Path(name).stem) for name, split in SPLITS.items()}
    for name, captions in CAPTIONS.items():
        path = place.resolve() / name
        assert examples[SPLITS[name], Path(name).stem] == Example(
            image=path.read_bytes(),
            embedding=None,
            image_path=os.path.relpath(path, source.root),
            image_id=Path(name).stem,
            captions=tuple(" ".join(caption.split()) for caption in captions),
            domain="",
        )


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k"])
def test_karpathy_file(tmp_path: Path, dataset: str) -> None:
    draw(tmp_path, FOLDERS[dataset])
    write_karpathy(tmp_path, dataset)
    source = flickr_source(dataset, tmp_path)
    check(source, tmp_path / FOLDERS[dataset])
    assert source.name == dataset
    assert source.notes[0].startswith(f"this is not the {dataset} that was published: train 1 of ")
    other = {"flickr8k": "flickr30k", "flickr30k": "flickr8k"}[dataset]
    (tmp_path / f"dataset_{dataset}.json").rename(tmp_path / f"dataset_{other}.json")
    with pytest.raises(UserError, match=f"not Karpathy's file of {other}"):
        flickr_source(other, tmp_path)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("dataset", "captions_file"), CAPTION_FILES)
def test_official_files(tmp_path: Path, dataset: str, captions_file: str, windows: bool) -> None:
    draw(tmp_path, "images")
    write_official(tmp_path, dataset, captions_file)
    if windows:
        for path in tmp_path.glob("*.*"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    check(flickr_source(dataset, tmp_path), tmp_path / "images")


def test_owners_zip_and_lists_of_ids(tmp_path: Path) -> None:
    draw(tmp_path, "Images")
    write_official(tmp_path, "flickr8k", "Flickr8k.token.txt")
    with zipfile.ZipFile(tmp_path / "Flickr8k_text.zip", "w") as archive:
        for path in tmp_path.glob("Flickr*.txt"):
            text = path.read_text() if "token" in path.name else path.read_text().replace(".jpg", "")
            archive.writestr(f"text/{path.name}", text)
            path.unlink()
    check(flickr_source("flickr8k", tmp_path), tmp_path / "Images")


def test_the_broken_line_of_kaggles_file(tmp_path: Path) -> None:
    """As it is there, without the second bar."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "2199200615.jpg")
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        "2199200615.jpg| 3| A dog is running .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    for split in ("train", "val", "test"):
        (tmp_path / f"karpathy_{split}_images.txt").write_text("2199200615.jpg\n" * (split == "test"))
    examples, problems = read(flickr_source("flickr30k", tmp_path))
    assert problems == []
    assert examples["test", "2199200615"].captions == ("A dog is running .", "A dog runs across the grass .")


def test_problems_in_official_files(tmp_path: Path) -> None:
    draw(tmp_path, "Images")
    write_official(tmp_path, "flickr8k", "Flickr8k.token.txt")
    first, second, third = CAPTIONS
    with (tmp_path / "Flickr8k.token.txt").open("a") as file:
        # The file names a picture as .jpg.1, and has others that are in no split.
        file.write(f"{first}#2\t \nno tab\n{third}.1#0\tA dog .\n2.jpg#0\tA cat .\n")
    with (tmp_path / "Flickr_8k.trainImages.txt").open("a") as file:
        file.write(f"{third}\n3.jpg\n{first}\n")
    (tmp_path / "Images" / second).unlink()
    source = flickr_source("flickr8k", tmp_path)
    examples, problems = read(source)
    assert source.notes[0] == "pictures of Flickr8k.token.txt that are in no split: 2"
    assert examples.keys() == {("train", Path(first).stem), ("test", Path(third).stem)}
    assert [str(problem).replace(str(tmp_path), "") for problem in problems] == [
        "Flickr8k.token.txt:7: bad line: no tab",
        "Flickr_8k.trainImages.txt:1: empty caption: image_id 1000268201_693b08cb0e",
        "Flickr_8k.trainImages.txt:3: no caption: image_id 3",
        "Flickr_8k.trainImages.txt:4: duplicate image_id: 1000268201_693b08cb0e, as in Flickr_8k.trainImages.txt:1",
        "Flickr_8k.trainImages.txt:2: image in two splits: "
        "1002674143_1b742ab4b8 is in 'train', but in 'test' in Flickr_8k.testImages.txt:1",
        f"Flickr_8k.devImages.txt:1: image missing: /Images/{second}",
    ]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)does not hold flickr8k. Put there:.*Flickr_8k.devImages.txt"):
        flickr_source("flickr8k", tmp_path)
    write_official(tmp_path, "flickr8k", "Flickr8k.token.txt")
    with pytest.raises(UserError, match="does not hold the pictures of flickr8k"):
        flickr_source("flickr8k", tmp_path)
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(UserError, match="does not hold flickr8k"):
        flickr_source("flickr8k", tmp_path)
    with pytest.raises(UserError, match=r"(?s)does not hold flickr30k. Put there:.*results_20130124.token"):
        flickr_source("flickr30k", tmp_path)


def test_lists_of_another_data_set(tmp_path: Path) -> None:
    write_official(tmp_path, "flickr30k", "results.csv")
    for split in ("train", "val", "test"):
        (tmp_path / f"karpathy_{split}_images.txt").write_text("val2014/COCO_val2014_000000391895.jpg 391895\n")
    with pytest.raises(UserError, match="no picture in common"):
        flickr_source("flickr30k", tmp_path)


def test_exchanged_lists_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, "images")
    write_karpathy(tmp_path, "flickr30k")
    monkeypatch.setitem(flickr.COUNTS, "flickr30k", {"train": 2, "val": 1, "test": 0})
    with pytest.raises(UserError, match="splits of flickr30k are not those that were published: train 1 of 2"):
        flickr_source("flickr30k", tmp_path)


def records(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in source.parts:
        assert isinstance(part.read, functools.partial)
        found |= {record.image: (part.split, record.captions) for record in part.read.args[0]}
    return found


@pytest.mark.slow
def test_all_of_flickr8k(shared: Path, tmp_path: Path) -> None:
    """Its real captions, splits and (small) pictures, in the owners' format."""
    lines = (shared / "data" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    expected = {record["image"]: record for record in map(json.loads, lines)}
    with tarfile.open(shared / "data" / "flickr8k" / "images_128.tar") as tar:
        tar.extractall(tmp_path / "Images", filter="data")
    with (tmp_path / "Flickr8k.token.txt").open("w") as file:
        for name, record in expected.items():
            file.writelines(f"{name}#{number}\t{text}\n" for number, text in enumerate(record["captions"]))
    for split, part in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = [name for name, record in expected.items() if record["split"] == split]
        (tmp_path / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names))
    source = flickr_source("flickr8k", tmp_path)
    assert source.notes == []
    examples, problems = read(source)
    assert problems == []
    assert len(examples) == 8000
    for (split, image_id), example in examples.items():
        record = expected[f"{image_id}.jpg"]
        assert split == record["split"]
        assert example.captions == tuple(" ".join(text.split()) for text in record["captions"])
        assert example.image == (tmp_path / "Images" / record["image"]).read_bytes()


def test_real_captions_of_flickr30k(shared: Path, tmp_path: Path) -> None:
    """All of val and test, in each of the three formats."""
    (tmp_path / "images").mkdir()
    expected = {}
    for split in ("val", "test"):
        path = shared / "data" / "flickr30k_captions" / f"flickr30k_karpathy_{split}_captions.json"
        for name, captions in json.loads(path.read_text()).items():
            expected[name] = split, [" ".join(caption.split()) for caption in captions]
    for split in ("train", "val", "test"):
        names = [name for name, (name_split, _) in expected.items() if name_split == split]
        (tmp_path / f"karpathy_{split}_images.txt").write_text("\n".join(names))
    content = {
        "dataset": "flickr30k",
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": caption} for caption in captions]}
            for name, (split, captions) in expected.items()
        ],
    }
    lines = [(name, i, text) for name, (_, captions) in expected.items() for i, text in enumerate(captions)]
    for file, text in {
        "dataset_flickr30k.json": json.dumps(content),
        "results_20130124.token": "".join(f"{name}#{i}\t{text}\n" for name, i, text in lines),
        "results.csv": "".join(f"{name}| {i}| {text}\n" for name, i, text in lines),
    }.items():
        (tmp_path / file).write_text(text)
        source = flickr_source("flickr30k", tmp_path)
        assert source.problems == []
        assert records(source) == expected
        (tmp_path / file).unlink()
