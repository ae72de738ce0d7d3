"""Data sets on gs://: always in a folder that stands in for it, and in an emulator where there is one
(`pip install gcp-storage-emulator gcsfs`)."""

import importlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

# They have no types.
backend, gpath = map(importlib.import_module, ("etils.epath.backend", "etils.epath.gpath"))


class Folder:
    """A backend of etils.epath that keeps gs://bucket/ in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        def method(*arguments: Any, **options: Any) -> Any:
            local = [str(argument).replace("gs:/", str(self._folder)) for argument in arguments]
            found = getattr(backend.os_backend, name)(*local, **options)
            return [path.replace(str(self._folder), "gs:/") for path in found] if name == "glob" else found

        return method


@pytest.fixture(params=["folder", "emulator"])
def bucket(
    request: pytest.FixtureRequest, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The tiny data sets on gs://."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "folder":
        folder = Folder(tmp_path)
        monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", folder)
        monkeypatch.setattr(gpath, "_GCS_BACKENDS", [folder])
        shutil.copytree(data_dir, tmp_path / "bucket" / "data", ignore=shutil.ignore_patterns("columns"))
        yield "gs://bucket/data"
        return
    gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs and gcp-storage-emulator")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcsfs and gcp-storage-emulator")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    for path in data_dir.rglob("*"):
        if path.is_file() and "columns" not in path.parts:
            tfds.core.Path("gs://bucket/data", path.relative_to(data_dir)).write_bytes(path.read_bytes())
    yield "gs://bucket/data"
    server.stop()
    gcsfs.GCSFileSystem.current().invalidate_cache()  # it knows what lay in the bucket


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
@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam: the extra beam")
@pytest.mark.parametrize("bucket", ["emulator"], indirect=True)  # which Beam's workers, processes of their own, see too
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
