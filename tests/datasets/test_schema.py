import dataclasses
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sources import listed

from clipcap_jax.datasets import Example, open_split, prepare, prepare_shapes, schema, shapes, shards
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.columns import open_columns

TEXTS = {"image_path": "/photos/ä 1.jpg", "image_id": "ä-1", "domain": "out-domain"}
IMAGE = bytes(range(256)) + b"\0\0"  # no picture: its bytes must come back untouched
EMBEDDING = np.array([1.5, -65504, 2**-24, 0], np.float16)


@pytest.mark.parametrize("captions", [(), ("a dog.",), ("ein Hündchen 🐕", 'it\'s\na "dog"', "")])
@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("has_images", [False, True])
def test_examples_come_back_as_they_were(tmp_path: Path, has_images: bool, width: int | None, captions: Any) -> None:
    image, embedding = IMAGE if has_images else None, EMBEDDING if width else None
    prepare.prepare(listed("tiny", "train", [Example(image, embedding, captions=captions, **TEXTS)]), str(tmp_path))

    split = open_split("tiny", "train", str(tmp_path))
    assert (split.name, split.split, split.encoder) == ("tiny", "train", "an encoder")
    assert (split.has_images, split.embedding_width) == (has_images, width)
    (read,) = split
    assert (read.image_path, read.image_id, read.domain) == (TEXTS["image_path"], TEXTS["image_id"], TEXTS["domain"])
    assert read.captions == captions
    assert read.image == (IMAGE if has_images else None)
    if width is None:
        assert read.embedding is None
    else:
        assert read.embedding is not None
        assert read.embedding.dtype == np.float16
        np.testing.assert_array_equal(read.embedding, EMBEDDING)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    prepare_shapes(folder, {"train": 60, "val": 6})
    return folder


def test_a_split_is_a_sequence(data_dir: str) -> None:
    split = open_split("shapes", "train", data_dir)
    ids = [example.image_id for example in split]
    assert len(split) == len(ids) == len(set(ids)) == 60
    assert split[-1].image_id == split[59].image_id == ids[59]
    assert [example.image_id for example in split[10:2:-3]] == ids[10:2:-3]
    assert [example.image_id for example in open_split("shapes", "train[:5]", data_dir)] == ids[:5]
    with pytest.raises(IndexError):
        split[60]


def test_threads_read_what_one_reads(data_dir: str) -> None:
    split = open_split("shapes", "train", data_dir)
    expected = list(split)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(split.__getitem__, range(60))) == expected


def test_a_split_can_be_sent_to_another_process(data_dir: str) -> None:
    split = open_split("shapes", "train", data_dir)
    assert pickle.loads(pickle.dumps(split))[7] == split[7]


@pytest.mark.parametrize("name", ["coco", "records/mine", "embeddings/coco"])
def test_tfds_reads_it(tmp_path: Path, name: str) -> None:
    """As docs/data.md shows; "coco" is a name of TFDS's own too."""
    prepare.prepare(listed(name, "val", [Example(IMAGE, EMBEDDING, captions=("a dog.",), **TEXTS)]), str(tmp_path))
    builder = tfds.builder_from_directory(tmp_path / name / "1.0.0")
    (example,) = builder.as_data_source("val", decoders={"image": tfds.decode.SkipDecoding()})
    assert (example["image_id"].decode(), example["captions"], example["image"]) == ("ä-1", [b"a dog."], IMAGE)


def test_what_is_not_there_is_said(data_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'tset'. It has: train, val"):
        open_split("shapes", "tset", data_dir)
    with pytest.raises(UserError, match=r"'train\[:x\]' cannot be read"):
        open_split("shapes", "train[:x]", data_dir)
    with pytest.raises(UserError, match=r"'shapes' is not prepared.*clipcap prepare shapes --data-dir /"):
        open_split("shapes", "train", str(tmp_path))
    with pytest.raises(UserError, match=r"'records/mine' is not prepared.*clipcap prepare records --name mine"):
        open_split("records/mine", "train", data_dir)
    with pytest.raises(UserError, match=r"'coco' is not prepared.*clipcap prepare coco --manual-dir FOLDER --data-dir"):
        open_split("coco", "train", data_dir)
    with pytest.raises(UserError, match=r"'embeddings/coco' is not.*clipcap embed DATASET --clip WEIGHTS --name coco"):
        open_split("embeddings/coco", "train", data_dir)
    with pytest.raises(UserError, match=r"'koko' is not prepared.*`clipcap prepare --help` lists"):
        open_split("koko", "train", data_dir)


def reseal(folder: Path) -> None:
    """As if what lies there now were what was written."""
    metadata = json.loads((folder / "metadata.json").read_text())
    del metadata["digest"]
    schema.seal(folder, metadata)


def test_another_schema_is_said(tmp_path: Path) -> None:
    prepare.prepare(listed("tiny", "train", [Example(None, None, captions=(), **TEXTS)]), str(tmp_path))
    folder = tmp_path / "tiny" / "1.0.0"

    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    reseal(folder)
    with pytest.raises(UserError, match="format tfrecord, which needs TensorFlow"):
        open_split("tiny", "train", str(tmp_path))
    (folder / "dataset_info.json").write_text(json.dumps(info))

    features = json.loads((folder / "features.json").read_text())
    del features["featuresDict"]["features"]["captions"]
    (folder / "features.json").write_text(json.dumps(features))
    reseal(folder)
    with pytest.raises(UserError, match="not in the schema of clipcap_jax: it has no captions"):
        open_split("tiny", "train", str(tmp_path))


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    """TensorFlow may well be installed: here is one that fails when it is imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from clipcap_jax.datasets import RecordsSource, open_split, prepare_records, prepare_shapes
prepare_shapes({str(tmp_path)!r}, {{"train": 5}})
open("c.csv", "w").write("image,caption\\n1.png,a dog.\\n")
open("1.png", "wb").write(open_split("shapes", "train", {str(tmp_path)!r})[0].image)
prepare_records(RecordsSource("r", "c.csv", images=".", split="test"), {str(tmp_path)!r})
print(open_split("records/r", "test", {str(tmp_path)!r})[0].captions, "tensorflow" in sys.modules)
"""
    code = Path(schema.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(code)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "('a dog.',) False"


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b"", lambda data: data[:65536]])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    prepare_shapes(str(tmp_path), {"train": 300})
    (shard,) = (tmp_path / "shapes" / "1.0.0").glob("*.array_record-*")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"The shard {shard} cannot be read: .* prepare the data set again"):
        list(open_split("shapes", "train", str(tmp_path)))
    with pytest.raises(UserError, match=rf"The shard {shard} cannot be read"):
        open_columns(open_split("shapes", "train", str(tmp_path)))
    assert not list((tmp_path / "shapes" / "1.0.0" / "columns").glob("[!.]*"))
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_split("shapes", "train", str(tmp_path))[0]


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 3)
    prepare_shapes(str(tmp_path), {"train": 60})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))
    try:
        split = open_split("shapes", "train", str(tmp_path))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(2**16, limits[1])
        assert len({split[index].image_id for index in [*range(60), *range(0, 60, 7)]}) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("damage", [truncated, lambda data: b""])
def test_damaged_metadata(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    prepare_shapes(str(tmp_path), {"train": 2})
    path = tmp_path / "shapes" / shards.VERSION / name
    path.write_bytes(damage(path.read_bytes()))
    for look in (lambda: open_split("shapes", "train", str(tmp_path)), lambda: prepare_shapes(str(tmp_path))):
        with pytest.raises(UserError, match=rf"{path.parent} is damaged: .*Delete it and prepare the data set again"):
            look()


def test_without_features(tmp_path: Path) -> None:
    prepare_shapes(str(tmp_path), {"train": 2})
    (tmp_path / "shapes" / shards.VERSION / "features.json").unlink()
    for look in (lambda: open_split("shapes", "train", str(tmp_path)), lambda: prepare_shapes(str(tmp_path))):
        with pytest.raises(UserError, match=r"1.0.0 is damaged: .*features.json.*Delete it and prepare the data set"):
            look()


def test_without_metadata(tmp_path: Path) -> None:
    prepare_shapes(str(tmp_path), {"train": 2})
    (tmp_path / "shapes" / shards.VERSION / "metadata.json").unlink()
    with pytest.raises(UserError, match=rf"{shards.VERSION} lacks its metadata.json"):
        open_split("shapes", "train", str(tmp_path))


def test_a_fingerprint_tells_what_was_prepared(tmp_path: Path) -> None:
    """Wherever it lies; runs and embeddings are held to it."""
    examples = [Example(None, EMBEDDING, captions=("a dog.",), **(TEXTS | {"image_id": name})) for name in "ab"]

    def fingerprint(folder: Path) -> str:
        return open_split("tiny", "train", str(folder)).fingerprint

    for name, source in (
        ("one", listed("tiny", "train", examples)),
        ("same", listed("tiny", "train", examples)),
        ("shorter", listed("tiny", "train", examples[:1])),
        ("other", dataclasses.replace(listed("tiny", "train", examples), origin={"captions": "another file"})),
        ("tower", dataclasses.replace(listed("tiny", "train", examples), encoder="another")),
    ):
        prepare.prepare(source, str(tmp_path / name))
    shutil.copytree(tmp_path / "one", tmp_path / "copied")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "same") == fingerprint(tmp_path / "copied")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")  # another file of the same content
    assert len({fingerprint(tmp_path / name) for name in ("one", "shorter", "tower")}) == 3


def test_exchanged_pictures_are_another_data_set(tmp_path: Path) -> None:
    """Of which sizes, ids and captions say nothing."""
    first, second = (
        Example(bytes([i]) * 9, None, captions=("a dog.",), **(TEXTS | {"image_id": str(i)})) for i in (1, 2)
    )
    exchanged = [dataclasses.replace(first, image=second.image), dataclasses.replace(second, image=first.image)]
    corrected = [dataclasses.replace(first, captions=("a cat.",)), second]
    found = {}
    for name, examples in (("one", [first, second]), ("exchanged", exchanged), ("corrected", corrected)):
        prepare.prepare(listed("tiny", "train", examples), str(tmp_path / name))
        found[name] = open_split("tiny", "train", str(tmp_path / name))
    assert len({split.fingerprint for split in found.values()}) == 3
    pictures = {name: [example.picture for example in split] for name, split in found.items()}
    assert pictures["one"] == pictures["corrected"] != pictures["exchanged"]


def test_a_data_set_that_is_prepared_anew_under_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open still gives the old examples, and the rest is an error."""
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 10)
    prepare_shapes(str(tmp_path), {"train": 60})
    split = open_split("shapes", "train", str(tmp_path))
    old = list(open_split("shapes", "train", str(tmp_path)))
    assert split[0] == old[0]
    shutil.rmtree(tmp_path / "shapes")
    monkeypatch.setattr(shapes, "write_captions", lambda figures: ("another caption.",))
    prepare_shapes(str(tmp_path), {"train": 60})
    assert split[:10] == old[:10]
    for index in range(10, 60):
        with pytest.raises(UserError, match=r"shapes/1.0.0 was deleted or prepared anew"):
            split[index]
