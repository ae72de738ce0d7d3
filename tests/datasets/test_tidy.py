import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import read

from clipcap_jax.datasets.coco import coco_source
from clipcap_jax.datasets.conceptual import conceptual_source
from clipcap_jax.datasets.flickr import flickr_source
from clipcap_jax.datasets.nocaps import nocaps_source
from clipcap_jax.datasets.source import Record
from clipcap_jax.datasets.tidy import tidy
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
