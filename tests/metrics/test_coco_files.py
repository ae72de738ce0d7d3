import json
from pathlib import Path
from typing import Any

import pytest

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import coco_files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


def test_results(file: Path) -> None:
    file.write_text('[{"image_id": 391895, "caption": "a man"}, {"image_id": "x.jpg", "caption": ""}]')
    assert coco_files.read_results(file) == {"391895": "a man", "x.jpg": ""}


def entry(image_id: Any = 1, caption: Any = "a dog") -> dict[str, Any]:
    return {"image_id": image_id, "caption": caption}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({"annotations": []}), "is a file of references"),
        (json.dumps({"1": "a dog"}), "is not a results file"),
        ("[]", "holds no captions"),
        ("[1, {}, null]", r"2 entries are no objects \{...\}: \[0\], \[2\]"),
        (json.dumps([entry(), {"image_id": 2}]), r"caption is not text in 1 entries: \[1\] has null"),
        ('[{"image_id": 1, "caption": NaN}]', r"caption is not text in 1 entries: \[0\] has NaN"),
        (json.dumps([entry(caption="bad \ud800")]), "caption is not text in 1 entries"),
        (json.dumps([entry("\udfff")]), "image_id is not a whole number or text in 1 entries"),
        (json.dumps([entry(1.0), entry(True), entry(None)]), r"image_id is not a whole number or text in 3 entries"),
        ('[{"image_id": NaN, "caption": "a"}]', r"image_id is not .* in 1 entries: \[0\] has NaN"),
        (
            json.dumps([entry(i // 2) for i in range(10)]),
            "5 images with more than one caption: 0, 1, 2 and 2 more",
        ),
        (json.dumps([entry(1), entry("1")]), "1 image with more than one caption: 1"),
    ],
)
def test_what_is_no_results_file(file: Path, content: str | bytes, message: str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        coco_files.read_results(file)


def test_no_such_file(file: Path) -> None:
    with pytest.raises(UserError, match=r"file\.json cannot be read: No such file"):
        coco_files.read_results(file)


def test_captions(file: Path) -> None:
    images = [{"id": 2, "file_name": "b.jpg", "domain": "in-domain"}, {"id": 1}, {"id": 3, "domain": "out-domain"}]
    annotations = [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}, {"image_id": 1, "caption": "z"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = coco_files.read_captions(file)
    assert found.images == {"1", "2", "3"}
    assert found.captions == {"1": ["x", "z"], "2": ["y"]}
    assert found.domains == {"2": "in-domain", "3": "out-domain"}
    assert found.file_names == {"2": "b.jpg"}
    assert coco_files.read_images(file) == ["2", "1", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([entry()], "Are the files exchanged"),
        ({"images": []}, "is not a captions file"),
        ({"annotations": {}}, "is not a captions file"),
        ({"annotations": [entry(caption=["a"])]}, r"caption is not text in 1 entries: annotations\[0\] has \[\"a\"\]"),
        ({"annotations": [], "images": {}}, "images is no list"),
        ({"annotations": [], "images": [{"file_name": "x"}]}, r"id is not a whole number or text in 1 entries"),
    ],
)
def test_what_is_no_captions_file(file: Path, content: Any, message: str) -> None:
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        coco_files.read_captions(file)


def test_written_results_are_read_back(file: Path) -> None:
    for other, ids in {"98": [12, 98], "x.jpg": ["12", "x.jpg"], "098": ["12", "098"]}.items():
        captions = {"12": "a dog", other: 'a "cät"'}
        coco_files.write_results(file, captions)
        assert coco_files.read_results(file) == captions
        assert [entry["image_id"] for entry in json.loads(file.read_text())] == ids  # never both kinds in one file


@pytest.mark.parametrize(
    ("image_id", "stored"), [("12", 12), ("012", "012"), ("a1", "a1"), ("٣", "٣"), ("4.0", "4.0"), ("9" * 99, "9" * 99)]
)
def test_only_numbers_become_numbers(image_id: str, stored: int | str) -> None:
    assert coco_files.coco_id(image_id) == stored
