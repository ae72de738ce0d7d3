"""Data sets on gs:// (see buckets.py)."""

import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import tensorflow_datasets as tfds
from original import load_clip
from sources import listed
from tiny import IMAGE_SIZE

from clipcap_jax import files
from clipcap_jax.datasets import Example, beam, open_split, prepare, prepare_shapes, schema, shapes
from clipcap_jax.errors import UserError
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.inputs.embed import Encoder, embed
from clipcap_jax.text.tokenizer import Tokenizer

gpath = importlib.import_module("etils.epath.gpath")  # it has no types


@pytest.fixture
def bucket(gs: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny data sets on gs://."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in data_dir.rglob("*"):
        if path.is_file() and "columns" not in path.parts:
            there = tfds.core.Path(gs, "data", path.relative_to(data_dir))
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
    return f"{gs}/data"


def test_a_data_set_on_gs(bucket: str, data_dir: Path) -> None:
    tokenizer = Tokenizer.train(["a dog"], 260)
    for size in (None, IMAGE_SIZE):
        there, here = (CaptionData(open_split("records/both", "train", str(at)), size) for at in (bucket, data_dir))
        assert list(there.captions) == list(here.captions)
        assert list(there.image_ids) == list(here.image_ids)
        np.testing.assert_array_equal(there.inputs(range(17)), here.inputs(range(17)))
        pairs, expected = there.pairs(tokenizer, 8), here.pairs(tokenizer, 8)
        np.testing.assert_array_equal(pairs.tokens, expected.tokens)
    assert there.image(3) == here.image(3)

    made = sorted(path.name for path in (files.home() / "columns").iterdir() if path.name.startswith("train"))
    assert len(made) == 2  # columns and tokens
    (copied,) = (files.home() / "files").glob("*/*")  # for the pictures
    assert ".array_record" in copied.name
    assert not list(files.home().glob("columns/*/*.array_record*"))


def test_the_same_content_under_two_names(bucket: str) -> None:
    """In the cache it is found by its digest, but is not taken for a file of the other name."""
    for name in ("one", "other"):
        example = Example(b"an image", None, "", "a", ("a dog.",), "")
        prepare.prepare(listed(name, "train", [example]), bucket)
        assert open_split(name, "train", bucket)[0].image == b"an image"
    first, second = (open_split(name, "train", bucket) for name in ("one", "other"))
    assert first.fingerprint == second.fingerprint


def test_a_part_on_gs(bucket: str, data_dir: Path) -> None:
    name, part = "records/embeddings", "val[2:4]"
    there, here = (CaptionData(open_split(name, part, str(at)), None) for at in (bucket, data_dir))
    assert len(there) == 2
    assert list(there.image_ids) == list(here.image_ids)
    np.testing.assert_array_equal(there.inputs([0, 1]), here.inputs([0, 1]))


def contents(folder: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_prepared_on_gs(bucket: str, tmp_path: Path) -> None:
    sizes = {"train": 30, "val": 4}
    assert not prepare_shapes(bucket, sizes).already_prepared
    prepare_shapes(str(tmp_path / "here"), sizes)
    there, here = (tfds.core.Path(at) / "shapes" / "1.0.0" for at in (bucket, tmp_path / "here"))
    assert contents(there) == contents(here)
    assert not list(files.home().glob("prepared/*/shapes/1.0.0*/*"))
    summary = prepare_shapes(bucket, sizes)
    assert (summary.already_prepared, summary.folder) == (True, str(there))
    with pytest.raises(UserError, match=r"scenes was .*'val': 4.*, is now .*'val': 5"):
        prepare_shapes(bucket, sizes | {"val": 5})


@pytest.mark.slow
@pytest.mark.skipif(needs.lacks("apache_beam"), reason="needs Apache Beam: the extra beam")
@pytest.mark.parametrize("gs", ["emulated_gs"], indirect=True)  # which Beam's workers, processes of their own, see too
def test_prepared_on_gs_by_beam(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed job has written is not written again, even from another machine."""
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 10)
    sizes = {"train": 35, "val": 4}
    prepare_shapes(str(tmp_path / "here"), sizes)
    there, here = (tfds.core.Path(at) / "shapes" / "1.0.0" for at in (bucket, tmp_path / "here"))
    options = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")

    with monkeypatch.context() as patch:
        patch.setattr(beam.RemoteWriter, "publish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_shapes(bucket, sizes, beam=options)
    assert not schema.is_finished(there)
    shutil.rmtree(files.home())
    monkeypatch.setattr(beam, "_job", None)  # no other job
    assert not prepare_shapes(bucket, sizes, beam=options).already_prepared
    assert contents(there) == contents(here)
    assert [path.name for path in there.parent.iterdir()] == ["1.0.0"]
    assert prepare_shapes(bucket, sizes, beam=options).already_prepared


def test_stopped_while_it_is_copied_to_gs(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied counts for nothing before all of it is there; then shards are not copied again."""
    monkeypatch.setattr(shapes, "PICTURES_PER_SHARD", 10)
    copy = gpath._GPath.copy
    copied: list[str] = []

    def limited(self: Any, target: Any, overwrite: bool = False) -> Any:
        if len(copied) in (2, 6):  # of 9 files
            copied.append("")
            raise OSError("the connection broke")
        copied.append(self.name)
        return copy(self, target, overwrite)

    monkeypatch.setattr(gpath._GPath, "copy", limited)
    for _ in range(2):
        with pytest.raises(UserError, match=r"shapes could not be prepared in gs://bucket/data: the connection broke"):
            prepare_shapes(bucket, {"train": 40})
        with pytest.raises(UserError, match="'shapes' is not prepared in gs://bucket/data"):
            open_split("shapes", "train", bucket)
    prepare_shapes(bucket, {"train": 40})
    assert len(shards := [name for name in copied if ".array_record-" in name]) == len(set(shards)) == 4
    assert copied[-1] == "dataset_info.json"
    prepare_shapes(str(tmp_path / "here"), {"train": 40})
    there, here = (tfds.core.Path(at) / "shapes" / "1.0.0" for at in (bucket, tmp_path / "here"))
    assert contents(there) == contents(here)


def test_killed_before_the_copy_on_the_disk_is_removed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves is not taken for new when the data set is deleted and prepared again."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill_at("1.0.0.copied", Path.rename))
        with pytest.raises(KeyboardInterrupt):
            prepare_shapes(bucket, {"train": 20})
    assert list(files.home().glob("prepared/*/shapes/1.0.0/dataset_info.json"))
    assert prepare_shapes(bucket, {"train": 20}).already_prepared
    assert not list(files.home().glob("prepared/*/shapes/1.0.0"))


def kill_at(name: str, rename: Any) -> Any:
    def killed(path: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise KeyboardInterrupt
        renamed: Path = rename(path, target)
        return renamed

    return killed


def test_killed_while_the_copy_on_the_disk_is_removed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            next(folder.glob("*.array_record-*")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_shapes(bucket, {"train": 20})
    there = tfds.core.Path(bucket) / "shapes" / "1.0.0"
    before = contents(there)
    assert prepare_shapes(bucket, {"train": 20}).already_prepared
    there.rmtree()
    prepare_shapes(bucket, {"train": 20})
    assert contents(there) == before


def test_embedded_on_gs(bucket: str, data_dir: Path) -> None:
    encoder = Encoder(*load_clip("vit")[:2])
    with pytest.raises(UserError, match=r"several hosts share this work on a disk .*, not on gs://bucket/data"):
        embed(encoder, "records/pictures", "mine", bucket, share=(0, 2))
    for at in (bucket, str(data_dir)):
        summary = embed(encoder, "records/pictures", "gs", at)
        assert summary is not None
        assert summary.folder == f"{at}/embeddings/gs/1.0.0"
    there, here = (CaptionData(open_split("embeddings/gs", "train", str(at)), None) for at in (bucket, data_dir))
    np.testing.assert_array_equal(there.inputs(range(17)), here.inputs(range(17)))
    assert list(there.captions) == list(here.captions)
    shutil.rmtree(data_dir / "embeddings")


def test_what_is_not_on_gs(bucket: str) -> None:
    with pytest.raises(UserError, match="'records/none' is not prepared in gs://bucket/data"):
        open_split("records/none", "train", bucket)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_without_gcsfs() -> None:
    with pytest.raises(UserError, match=r"gs://bucket/data cannot be reached: .*pip install clipcap_jax\[gcs\]"):
        open_split("records/both", "train", "gs://bucket/data")
    with pytest.raises(UserError, match=r"gs://bucket/data cannot be reached: .*pip install clipcap_jax\[gcs\]"):
        prepare_shapes("gs://bucket/data")
