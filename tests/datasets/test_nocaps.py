import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import read

from clipcap_jax.datasets import nocaps
from clipcap_jax.datasets.nocaps import nocaps_source
from clipcap_jax.datasets.schema import Example
from clipcap_jax.errors import UserError


def entry(number: int, name: str, **fields: Any) -> dict[str, Any]:
    """As on https://nocaps.org/download; `domain` is in the validation captions alone."""
    return {
        "id": number,
        "open_images_id": name,
        "height": 1024,
        "width": 732,
        "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}.jpg",
        "file_name": f"{name}.jpg",
        "license": 0,
        "date_captured": "2018-11-06 11:04:33",
    } | fields


def val() -> dict[str, Any]:
    # Captions of nocaps' first picture; the second's are ours.
    texts = [
        (0, "A baby is standing in front of a house."),
        (1, "Ein Hund\nim Café ☕ "),
        (0, "A girl in sandals."),
    ]
    return {
        "licenses": [],
        "info": {"description": "nocaps validation dataset"},
        "images": [
            entry(0, "0013ea2087020901", domain="in-domain"),
            entry(1, "0032257bf3cd56d0", domain="out-domain"),
        ],
        "annotations": [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(texts)],
    }


def info() -> dict[str, Any]:
    return {"licenses": [], "info": {}, "images": [entry(0, "0000d67245642c5f"), entry(1, "0001244aa8ed3099")]}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write(folder: Path, **contents: Any) -> None:
    for split, content in ({"val": val(), "test": info()} | contents).items():
        (folder / nocaps.FILES[split]).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    for split, content in (("validation", val()), ("test", info())):
        (tmp_path / split).mkdir()
        for index, image in enumerate(content["images"]):
            picture = Image.new("RGB", (8, 6), (index, len(split), 0))
            picture.save(tmp_path / split / f"{image['open_images_id']}.jpg")
    return tmp_path


def test_val_and_test(folder: Path) -> None:
    source = nocaps_source(folder)
    examples, problems = read(source)
    assert problems == []
    expected = {
        ("val", "0"): ("validation/0013ea2087020901", "in-domain"),
        ("val", "1"): ("validation/0032257bf3cd56d0", "out-domain"),
        ("test", "0"): ("test/0000d67245642c5f", ""),
        ("test", "1"): ("test/0001244aa8ed3099", ""),
    }
    captions = {
        ("val", "0"): ("A baby is standing in front of a house.", "A girl in sandals."),
        ("val", "1"): ("Ein Hund im Café ☕",),
    }
    assert examples.keys() == expected.keys()
    for key, (name, domain) in expected.items():
        path = folder.resolve() / f"{name}.jpg"
        assert examples[key] == Example(
            image=path.read_bytes(),
            embedding=None,
            image_path=os.path.relpath(path, source.root),
            image_id=key[1],
            captions=captions.get(key, ()),
            domain=domain,
        )
    assert source.notes == [
        "this is not the nocaps that was published: val 2 of 4,500",
        "this is not the nocaps that was published: test 2 of 10,600",
    ]


def test_val_alone(folder: Path) -> None:
    (folder / nocaps.FILES["test"]).unlink()
    (folder / "validation").rename(folder / "images")
    examples, problems = read(nocaps_source(folder))
    assert problems == []
    assert examples.keys() == {("val", "0"), ("val", "1")}


def test_file_names_other_than_the_ids(folder: Path) -> None:
    content = val()
    content["images"][0]["file_name"] = "0.jpg"
    content["images"][1]["file_name"] = "1.jpg"
    (folder / "validation" / "0032257bf3cd56d0.jpg").rename(folder / "validation" / "1.jpg")
    write(folder, val=content)
    examples, problems = read(nocaps_source(folder))
    assert problems == []
    assert examples["val", "0"].image_path.endswith("/0013ea2087020901.jpg")
    assert examples["val", "1"].image_path.endswith("/1.jpg")


def test_problems(folder: Path) -> None:
    content = val()
    content["images"] += [
        entry(2, "x", domain="in_domain"),
        entry(0, "y", domain="in-domain"),
        entry(4, "z", domain="in-domain"),
        entry(5, "z5", domain="in-domain"),
        {},
    ]
    content["annotations"] += [{"image_id": 9, "caption": "A cat."}, {"image_id": 5, "caption": "A cat."}]
    write(folder, val=content)
    _, problems = read(nocaps_source(folder))
    name = nocaps.FILES["val"]
    assert [(problem.where, problem.reason) for problem in problems] == [
        (f"{name}: annotations[3]", "caption of an unknown image"),
        (f"{name}: images[0]", "duplicate image_id"),
        (f"{name}: images[3]", "duplicate image_id"),
        (f"{name}: images[2]", "wrong domain"),
        (f"{name}: images[4]", "no caption"),
        (f"{name}: images[6]", "wrong domain"),
        (f"{name}: images[5]", "image missing"),
    ]


def test_exchanged_and_missing_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(folder, val=info())
    with pytest.raises(UserError, match=r"val_4500_captions.json lacks the list 'annotations'.*exchanged"):
        nocaps_source(folder)
    write(folder, test=val())
    with pytest.raises(UserError, match=r"test_image_info.json has the list 'annotations'.*exchanged"):
        nocaps_source(folder)
    write(folder)
    (folder / "test").rename(folder / "others")
    with pytest.raises(UserError, match="does not hold the pictures of nocaps test"):
        nocaps_source(folder)
    with pytest.raises(UserError, match=r"(?s)does not hold nocaps. Put there:.*nocaps_val_4500_captions.json"):
        nocaps_source(tmp_path_factory.mktemp("empty"))


def test_real_captions_and_domains(shared: Path, tmp_path: Path) -> None:
    """All of val, from the corpus of the ViECap repository, written in the owners' format."""
    real = shared / "data" / "nocaps"
    corpus = {int(row["image_id"].removesuffix(".jpg")): row for row in read_json(real / "nocaps_val_corpus.json")}
    names = {row["img_id"]: Path(row["image"]).stem for row in read_json(real / "nocaps_val_image_ids.json")}
    content = {
        "images": [
            entry(number, names[number], domain=corpus[number]["split"].replace("_", "-")) for number in sorted(corpus)
        ],
        "annotations": [
            {"image_id": number, "caption": text} for number, picture in corpus.items() for text in picture["caption"]
        ],
    }
    (tmp_path / nocaps.FILES["val"]).write_text(json.dumps(content))
    (tmp_path / "val").mkdir()
    source = nocaps_source(tmp_path)
    assert (source.problems, source.notes) == ([], [])
    records: dict[int, Any] = {}
    for part in source.parts:
        assert isinstance(part.read, functools.partial)
        assert part.split == "val"
        records |= {int(record.image_id): record for record in part.read.args[0]}
    assert records.keys() == corpus.keys()
    for number, record in records.items():
        assert record.image == f"val/{names[number]}.jpg"
        assert record.captions == [" ".join(text.split()) for text in corpus[number]["caption"]]
        assert record.domain == corpus[number]["split"].replace("_", "-")
