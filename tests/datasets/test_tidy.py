import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import read

from clipcap_jax.datasets.coco import coco_source
from clipcap_jax.datasets.conceptual import conceptual_source
from clipcap_jax.datasets.flickr import flickr_source
from clipcap_jax.datasets.nocaps import nocaps_source
from clipcap_jax.datasets.source import Problem, Record
from clipcap_jax.datasets.tidy import find_pictures, tidy
from clipcap_jax.errors import UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)
# Enough that is right for the rest to be reached.
fields = {
    "filename": json_values | st.sampled_from(["1.jpg", "2.jpg"]),
    "file_name": json_values | st.sampled_from(["COCO_train2014_1.jpg", "COCO_val2014_1.jpg"]),
    "filepath": json_values,
    "cocoid": json_values,
    "id": json_values,
    "image_id": json_values,
    "open_images_id": json_values,
    "caption": json_values,
    "domain": json_values | st.just("in-domain"),
    "split": json_values | st.sampled_from(["train", "restval", "val", "test"]),
    "sentences": json_values | st.lists(st.fixed_dictionaries({}, optional={"raw": json_values}), max_size=2),
}
objects = st.lists(st.fixed_dictionaries({}, optional=fields), max_size=4)
records = st.builds(
    Record,
    where=st.just("file"),
    image=st.sampled_from(["1.jpg", "2.jpg", "3.jpg"]),
    image_id=st.sampled_from(["1", "2", "3"]),
    captions=st.lists(st.text(max_size=3), max_size=2),
    split=st.sampled_from(["train", "val", "test"]),
)


@given(st.lists(records, max_size=6), st.booleans())
def test_each_picture_once_and_none_both_trained_and_tested_on(rows: list[Record], captioned: bool) -> None:
    named = {row.image_id for row in rows}
    kept, problems, _ = tidy(rows, captioned)
    assert len({record.image_id for record in kept}) == len(kept)
    assert len({record.image for record in kept}) == len(kept)
    assert len(kept) + len(problems) >= len(rows)
    for record in kept:
        assert record.captions or not captioned
        assert all(caption and caption == " ".join(caption.split()) for caption in record.captions)
    if not captioned:  # nothing but a rival of the same name, or of the same file, can put a picture out
        assert not rows or kept
        assert {record.image_id for record in kept} <= named


def test_a_picture_that_two_of_train_are() -> None:
    def record(image: str, image_id: str, split: str) -> Record:
        return Record("file", image, image_id, ["A cat."], split)

    test = record("2.jpg", "1", "test")
    kept, problems, _ = tidy([record("1.jpg", "1", "train"), record("2.jpg", "2", "train"), test])
    assert kept == [test]
    assert [problem.reason for problem in problems] == ["image in two splits"] * 2


@given(objects, objects)
def test_whatever_json_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, images: Any, annotations: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("train2014", "val2014", "val", "test", "images"):
        (folder / name).mkdir()
    for split in ("val", "test"):
        (folder / f"karpathy_{split}_images.txt").write_text("1\n" if split == "val" else "2\n")
    content = {"images": images, "annotations": annotations}
    for names, source, extra in [
        (["captions_train2014.json", "captions_val2014.json"], coco_source, {}),
        (["dataset_coco.json"], coco_source, {"dataset": "coco"}),
        (["dataset_flickr8k.json"], lambda place: flickr_source("flickr8k", place), {"dataset": "flickr8k"}),
        (["nocaps_val_4500_captions.json"], nocaps_source, {}),
    ]:
        for name in names:
            (folder / name).write_text(json.dumps(content | extra))
        with contextlib.suppress(UserError):
            examples, _ = read(source(folder))
            assert not examples  # there are no pictures


@given(st.binary(max_size=60) | st.text(st.sampled_from("a\t\n\r# |.jpg0é\ufeff"), max_size=60).map(str.encode))
def test_whatever_bytes_a_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").mkdir()
    for split in ("train", "val", "test"):
        (folder / f"karpathy_{split}_images.txt").write_bytes(data if split == "train" else b"1.jpg\n")
    for name in ("results.csv", "results_20130124.token"):
        (folder / name).write_bytes(data)
        with contextlib.suppress(UserError):
            read(flickr_source("flickr30k", folder))
    (folder / "train").mkdir()
    (folder / "train" / "00000000.jpg").write_bytes(data)
    (folder / "cc12m.tsv").write_bytes(data)
    for shard in (None, "00000.tar"):
        if shard:
            (folder / "train" / shard).write_bytes(data)
        with contextlib.suppress(UserError):
            examples, problems = read(conceptual_source("cc12m", folder))
            assert not examples
            assert problems or not data


def record(image: str, caption: str = "A cat.", *, split: str = "", image_id: str = "", where: str = "file") -> Record:
    return Record(where, image, image_id, [caption], split, joins=True)


@pytest.mark.parametrize(
    ("images", "ids"),
    [
        (["a/000.jpg", "b.JPEG", "c.webp"], ["a/000", "b", "c"]),
        (["000.jpg", "000.png", "001.jpg"], ["000.jpg", "000.png", "001"]),  # two files, two pictures
        (["v1.2", "mr. x", ".jpg"], ["v1.2", "mr. x", ".jpg"]),  # no suffix of a picture
        (["1.jpg", "1.jpg"], ["1"]),
    ],
)
def test_ids_of_file_names(images: list[str], ids: list[str]) -> None:
    records, problems, _ = tidy([record(image) for image in images])
    assert [each.image_id for each in records] == ids
    assert problems == []


def test_a_picture_of_train_and_another_split_stays_in_the_other() -> None:
    rows = [record("1.jpg", split="train"), record("1.jpg", split="test", where="f:2"), record("1.jpg", split="train")]
    (kept,), problems, _ = tidy(rows)
    assert (kept.split, kept.where) == ("test", "f:2")
    assert [problem.reason for problem in problems] == ["image in two splits"] * 2


@pytest.mark.parametrize(
    ("split", "usual"),
    [("validation", "val"), ("dev", "val"), ("Train", "train"), ("TEST", "test"), ("val", "val"), ("Extra", "Extra")],
)
def test_names_of_splits(split: str, usual: str) -> None:
    (kept,), _, notes = tidy([record("1.jpg", split=split)])
    assert kept.split == usual
    assert notes == ([] if split == usual else [f"split {split!r} was taken for {usual!r}: 1"])


@pytest.mark.parametrize("split", ["all", "ALL"])
def test_a_split_called_all_is_refused(split: str) -> None:
    with pytest.raises(UserError, match=r"c.csv:3: no split can be called"):
        tidy([record("1.jpg"), record("2.jpg", split=split, where="c.csv:3")])


@pytest.mark.parametrize(
    ("caption", "captions"),
    [
        ("[]", None),
        (str(["a dog", 'it\'s "one"']), ["a dog", 'it\'s "one"']),
        ('["a dog", "caf\\u00e9"]', ["a dog", "café"]),
        ("('a dog', 'a  cat')", ["a dog", "a cat"]),
        (" ['a dog'] ", ["a dog"]),
        ("['a' 'b']", None),  # two texts for NumPy, one for Python
        ("array(['a', 'b'], dtype=object)", None),
        ("{'caption': 'a dog'}", None),
        ('{"raw": "a dog"}', None),
        ("['a dog', 'cut off", None),
        ("('70s style) a man", ["('70s style) a man"]),
        ("[unclear]", ["[unclear]"]),
        ("a dog [barks]", ["a dog [barks]"]),
    ],
)
def test_the_text_of_a_list_is_read_or_reported(caption: str, captions: list[str] | None) -> None:
    records, problems, notes = tidy([record("1.jpg", caption, where="c.csv:7")])
    assert [each.captions for each in records] == ([captions] if captions else [])
    reason = "empty caption" if caption == "[]" else "caption is no text"
    assert [(each.where, each.reason) for each in problems] == ([] if captions else [("c.csv:7", reason)])
    assert bool(notes) == (captions != [caption])


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        *((text, "stand for no value") for text in ("nan", "None", "NULL", "<NA>", " n/a ")),
        ("salt &amp; pepper", "hold HTML"),
        ("a dog<br />a cat", "hold HTML"),
        ("a dog\\nA cat", "hold an escape such as \\n"),
        ("caf\ufffd", "hold a character that was lost"),
        ("https://example.com/1.jpg", "are a link"),
    ],
)
def test_what_looks_odd_is_kept_and_counted(caption: str, kind: str) -> None:
    rows = [record("0.jpg", "a man < a bear & a nan"), *(record(f"{i}.jpg", caption, where="f:2") for i in (1, 2))]
    records, problems, notes = tidy(rows)
    assert len(records) == 3
    assert problems == []
    assert notes == [f"captions that {kind}: 2, such as {caption!r} in f:2"]


@pytest.mark.parametrize(
    ("named", "there", "how"),
    [
        ("{}.jpg", "{}.JPG", "upper and lower case"),
        ("é{}.jpg", "e\u0301{}.jpg", "Unicode normal form"),
        ("a\\{}.jpg", "a/{}.jpg", "slashes"),
        ("{}.jpg", "{}.png", "the suffix"),
        ("{}.jpg", "a/{}.jpg", "the folder"),
        ("photos/{}.jpg", "{}.jpg", "the folder"),
    ],
)
def test_near_misses_are_named_once(tmp_path: Path, named: str, there: str, how: str) -> None:
    (tmp_path / "a").mkdir()
    for index in range(20):
        (tmp_path / there.format(index)).touch()
    rows: list[Record | Problem] = [record(named.format(index), where=f"c.csv:{index}") for index in range(20)]
    rows += [*rows[:5], record("none.jpg")]
    (problem, gone), notes = find_pictures(rows, tmp_path)
    assert gone is rows[-1]  # it is named when it is read
    assert isinstance(problem, Problem)
    assert (problem.where, problem.reason, problem.count, notes) == ("c.csv:0", "image missing", 20, [])
    assert problem.detail == (
        f"{named.format(0)} is not there, but {there.format(0)} is: they differ in {how}, as in 20 names"
    )


def test_what_may_be_two_files_is_neither(tmp_path: Path) -> None:
    for name in ("1.png", "1.webp", "1.gif"):
        (tmp_path / name).touch()
    rows: list[Record | Problem] = [record("1.jpg"), record("1", image_id="1")]
    assert find_pictures(rows, tmp_path) == (rows, [])


def test_a_number_in_another_folder_is_another_picture(tmp_path: Path) -> None:
    for folder in ("cam1", "cam2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cam1" / "000000000012.jpg").touch()
    rows, notes = find_pictures([Record("c:1", "cam2/000000000012.jpg", "", ["a."], "")], tmp_path)
    assert notes == []
    assert not any(isinstance(row, Record) and row.image.startswith("cam1") for row in rows)
    (tmp_path / "cam2" / "000000000012.jpg").touch()
    rows, notes = find_pictures([Record("c:1", "12", "12", ["a."], "")], tmp_path)
    assert notes == []
    assert [row.image for row in rows if isinstance(row, Record)] == ["12"]


def test_pictures_by_their_id_and_by_cocos_number(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    for name in ("dog.jpg", "train2017/000000000009.jpg", "COCO_val2014_000000000042.jpg"):
        (tmp_path / name).touch()
    rows = [record("dog", image_id="dog"), record("9", image_id="9"), record("42", image_id="42")]
    rows.append(record("val2017/000000000042.jpg", image_id="other"))
    found, notes = find_pictures(rows, tmp_path)
    assert [each.image for each in found if isinstance(each, Record)] == [
        "dog.jpg",
        "train2017/000000000009.jpg",
        "COCO_val2014_000000000042.jpg",
        "COCO_val2014_000000000042.jpg",
    ]
    assert notes == ["pictures found by their id or number under another name: 4"]
    records, (problem,), _ = tidy(found)
    assert len(records) == 3
    assert problem.reason == "image under two ids"
