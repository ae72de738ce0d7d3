import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sources import read
from tiny import Clipcap

from clipcap_jax.datasets import schema, tfds_coco
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.tfds_coco import tfds_coco_source
from clipcap_jax.errors import UserError

# Pictures by number and captions by TFDS's split; some are COCO's (CC BY 4.0).
CAPTIONS: dict[str, dict[int, list[str]]] = {
    "train": {9: ["Closeup of bins of food.", "Café ☕\twith\nfood "], 25: ["A giraffe."], 30: ["A vase.", "A pot."]},
    "val": {184613: ["A child holding a flowered umbrella."]},
    "test": {391895: ["A man with a red helmet."]},
    "restval": {42: ["This wire metal rack holds several pairs of shoes and sandals"]},
}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """With the features of TFDS's own builder."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]  # noqa: RUF012  # as TFDS wants it
    pkg_dir_path = Path(__file__).parent
    broken: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=80),
                    "is_crowd": np.bool_,
                }
            ),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        return {split: self._generate_examples(split) for split in CAPTIONS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, captions in CAPTIONS[split].items():
            image = picture(number)[: 300 if number in self.broken else None]
            box = tfds.features.BBox(ymin=0.0, xmin=0.1, ymax=0.5, xmax=0.6)
            texts = [("" if number in self.empty else text) for text in captions]
            yield (
                number,
                {
                    "image": image,
                    "image/filename": f"COCO_{number}.jpg",
                    "image/id": number,
                    "objects": [{"id": 1, "area": 4, "bbox": box, "label": 3, "is_crowd": False}],
                    "captions": [{"id": place, "text": text} for place, text in enumerate(texts)],
                },
            )


def prepare(data_dir: Path, builder: type[CocoCaptions] = CocoCaptions, file_format: str = schema.FILE_FORMAT) -> None:
    builder(data_dir=data_dir, file_format=file_format).download_and_prepare()


@pytest.mark.parametrize("file_format", [schema.FILE_FORMAT, "tfrecord"])
def test_all_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    if file_format != schema.FILE_FORMAT:
        needs.skip_without("tensorflow")
    monkeypatch.setattr(tfds_coco, "PICTURES_PER_SHARD", 2)
    prepare(tmp_path, file_format=file_format)
    source = tfds_coco_source(tmp_path)
    assert [(part.split, part.read.args[1]) for part in source.parts] == [  # type: ignore[attr-defined]
        ("train", "train"),
        ("train", "train"),
        ("train", "restval"),
        ("val", "val"),
        ("test", "test"),
    ]
    examples, problems = read(source)
    assert problems == []
    expected = {
        ("train" if split == "restval" else split, str(number)): captions
        for split, pictures in CAPTIONS.items()
        for number, captions in pictures.items()
    }
    assert examples.keys() == expected.keys()
    for key, captions in expected.items():
        assert examples[key] == Example(
            image=picture(int(key[1])),
            embedding=None,
            image_path="",
            image_id=key[1],
            captions=tuple(" ".join(caption.split()) for caption in captions),
            domain="",
        )
    assert (source.name, source.has_images) == ("coco", True)
    assert source.notes == [
        "this is not the COCO that was published: train 4 of 113,287, val 1 of 5,000, test 1 of 5,000"
    ]


def test_prepared_again_as_ours(tmp_path: Path, clipcap: Clipcap) -> None:
    prepare(tmp_path / "theirs")
    options = ("--manual-dir", tmp_path / "theirs", "--data-dir", tmp_path / "ours", "--processes", 1)
    assert clipcap("prepare", "tfds-coco", *options) == 0
    found = {
        (split, example.image_id): (example.image, example.captions)
        for split in ("train", "val", "test")
        for example in schema.open_split("coco", split, str(tmp_path / "ours"))
    }
    assert found == {
        ("train" if split == "restval" else split, str(number)): (
            picture(number),
            tuple(" ".join(caption.split()) for caption in captions),
        )
        for split, pictures in CAPTIONS.items()
        for number, captions in pictures.items()
    }


def test_the_folder_itself(tmp_path: Path) -> None:
    prepare(tmp_path)
    source = tfds_coco_source(tmp_path / "coco_captions" / "2014" / "1.1.0")
    examples, problems = read(source)
    assert problems == []
    assert len(examples) == 6


def test_problems(tmp_path: Path) -> None:
    class Bad(CocoCaptions, skip_registration=True):  # type: ignore[call-arg]
        name = "coco_captions"
        broken = (25,)
        empty = (42,)

    prepare(tmp_path, Bad)
    examples, problems = read(tfds_coco_source(tmp_path))
    assert ("train", "25") not in examples
    assert ("train", "42") not in examples
    assert len(examples) == 4
    assert sorted(problem.reason for problem in problems) == ["empty caption", "image broken"]


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"(?s)does not hold TFDS's coco_captions. Put there:.*tfds build"):
        tfds_coco_source(tmp_path)

    class Other(CocoCaptions, skip_registration=True):  # type: ignore[call-arg]
        name = "other"

    prepare(tmp_path, Other)
    with pytest.raises(UserError, match=r"holds other/2014/1.1.0, not coco_captions"):
        tfds_coco_source(tmp_path / "other" / "2014" / "1.1.0")

    prepare(tmp_path)
    info = tmp_path / "coco_captions" / "2014" / "1.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is in the format tfrecord, which needs TensorFlow"):
        tfds_coco_source(tmp_path)
