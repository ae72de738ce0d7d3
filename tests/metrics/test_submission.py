import json
import zipfile
from pathlib import Path

import pytest

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import coco_files, submission


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of four pictures, which is how many a split has here."""
    monkeypatch.setattr(submission, "COUNTS", dict.fromkeys(submission.COUNTS, 4))
    file = tmp_path / "images.json"
    file.write_text(json.dumps({"images": [{"id": i} for i in (7, 3, 9, 1)]}))
    return file


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    file = tmp_path / "captions.json"
    coco_files.write_results(file, {str(i): f"caption {i}" for i in (1, 3, 7, 9)})
    return file


ENTRIES = [{"image_id": i, "caption": f"caption {i}"} for i in (7, 3, 9, 1)]


def test_nocaps(captions: Path, images: Path, tmp_path: Path) -> None:
    submission.write_nocaps(tmp_path / "results.json", submission.checked("nocaps test", captions, images))
    assert json.loads((tmp_path / "results.json").read_text()) == ENTRIES


def test_coco(captions: Path, images: Path, tmp_path: Path) -> None:
    results = {split: submission.checked(split, captions, images) for split in ("val2014", "test2014")}
    submission.write_coco(tmp_path / "results.zip", "mine", results)
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        names = ["captions_val2014_mine_results.json", "captions_test2014_mine_results.json"]
        assert archive.namelist() == names
        assert all(json.loads(archive.read(name)) == ENTRIES for name in names)


def test_every_problem_is_told(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "captions.json"
    coco_files.write_results(file, {"1": "a", "3": " ", "x": "b", "12": "c"})
    with pytest.raises(UserError) as error:
        submission.checked("nocaps val", file, images)
    for problem in (
        "2 pictures have no caption: 7, 9",
        "2 captions are of pictures that are not listed: x, 12",
        "1 captions are empty: 3",
        "1 image ids are no numbers: x",
    ):
        assert problem in str(error.value)


def test_a_list_of_other_pictures(captions: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "COUNTS", {"test2014": 40_775})
    with pytest.raises(UserError, match=r"images\.json lists 4 pictures, and test2014 has 40,775"):
        submission.checked("test2014", captions, images)


def test_a_list_with_a_picture_twice(captions: Path, tmp_path: Path, images: Path) -> None:
    images.write_text(json.dumps({"images": [{"id": i} for i in (7, 3, 9, 1, 7)]}))
    with pytest.raises(UserError, match="lists 1 pictures twice"):
        submission.checked("nocaps val", captions, images)
