import errno
import tarfile
from pathlib import Path

import pytest
from shards import WRITERS, jpeg, keyed, sample, write_stats, write_tar

from clipcap_jax import pictures
from clipcap_jax.datasets import img2dataset
from clipcap_jax.datasets.img2dataset import Sample
from clipcap_jax.datasets.source import Problem


@pytest.mark.parametrize("kind", WRITERS)
def test_a_shard(tmp_path: Path, kind: str) -> None:
    samples = {"000000002": sample(2), "000000003": {"txt": b"Alone.", "doc": b"of no use"}}
    WRITERS[kind](tmp_path / "00000", samples)
    path = tmp_path / ("00000.tar" if kind == "tar" else "00000")
    whole, alone = img2dataset.read(path)
    assert isinstance(whole, Sample)
    assert isinstance(alone, Sample)
    assert whole.where.startswith(f"{tmp_path.name}/{path.name}")
    assert (whole.key, whole.caption, whole.url) == ("000000002", "Picture 2.", "http://example.com/2.jpg")
    assert whole.image == jpeg(2)
    assert whole.image_path == ("" if kind == "tar" else str(path / "000000002.jpg"))
    assert (alone.key, alone.caption, alone.url, alone.image, alone.image_path) == ("000000003", "Alone.", "", None, "")
    assert not whole.fault
    assert not alone.fault


def test_counts(tmp_path: Path) -> None:
    file = tmp_path / "00000_stats.json"
    for shard in (tmp_path / "00000.tar", tmp_path / "00000"):
        file.unlink(missing_ok=True)
        assert img2dataset.stats(shard) == {}
        write_stats(file, 3, dead=2, unusable=1)
        expected = {"count": 6, "successes": 3, "failed_to_download": 2, "failed_to_resize": 1}
        assert img2dataset.stats(shard) == expected
        for text in ("", "[6, 3, 2, 1]", '{"count": 6}', '{"count": "6"}', "[" * 100_000):
            file.write_text(text)
            assert img2dataset.stats(shard) == {}


def shard(path: Path) -> tuple[list[str], list[Problem]]:
    """Keys and problems."""
    found = list(img2dataset.read(path))
    return [each.key for each in found if isinstance(each, Sample)], [
        each for each in found if isinstance(each, Problem)
    ]


def test_a_tar_that_was_cut_off(tmp_path: Path) -> None:
    """Wherever the end is missing, the tar is named, and what came before is kept."""
    path = tmp_path / "00000.tar"
    write_tar(path, keyed(1, 2, 3))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in [*range(1, end + 1, 256), end]:
        path.write_bytes(whole[:length])
        keys, problems = shard(path)
        broken = [problem for problem in problems if problem.reason == "broken tar"]
        assert [(problem.where, problem.count) for problem in broken] == [(f"{tmp_path.name}/00000.tar", 1)], length
        assert str(path) in broken[0].detail
        assert keys == ["000000001", "000000002", "000000003"][: len(keys)]
        assert len(keys) + len(problems) >= (4 if length == end else 1)
    write_stats(tmp_path / "00000_stats.json", 3)
    path.write_bytes(whole[: end // 3])
    _, problems = shard(path)
    assert problems[-1].reason == "broken tar"
    assert problems[-1].count >= 2

    write_tar(path, keyed(1, 2))  # whole, but not all of what img2dataset wrote
    _, problems = shard(path)
    assert [(problem.reason, problem.count) for problem in problems] == [("broken tar", 1)]
    path.write_bytes(b"")
    assert shard(path)[1][0].count == 3
    path.write_bytes(whole)
    assert shard(path) == (["000000001", "000000002", "000000003"], [])


def test_a_picture_that_claims_to_be_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar of 10 kB may stand for 20 GB: what is not stored is read as zeros."""
    monkeypatch.setenv(pictures.MAX_BYTES, "10000")
    path = tmp_path / "00000.tar"
    write_tar(path, keyed(1, 2))
    sparse = tarfile.TarInfo("000000003.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    sparse.pax_headers |= {"GNU.sparse.size": str(20 * 2**30), "GNU.sparse.numblocks": "1"}
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
    *whole, huge = img2dataset.read(path)
    assert [sample.image is not None for sample in whole if isinstance(sample, Sample)] == [True, True]
    assert isinstance(huge, Sample)
    assert huge.image is None
    assert huge.fault.startswith("its .jpg cannot be read: The image is too large: it has more than 10,000 bytes")


def test_a_size_that_no_file_has(tmp_path: Path) -> None:
    """tarfile raises ValueError for it."""
    path = tmp_path / "00000.tar"
    write_tar(path, keyed(1, 2))
    data = bytearray(path.read_bytes())
    start = data.index(b"000000002.txt")
    data[start + 124 : start + 136] = b"\x80" + bytes(3) + (2**63).to_bytes(8, "big")
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    keys, problems = shard(path)
    assert keys[:1] == ["000000001"]
    assert [problem.reason for problem in problems] == ["broken tar"]


@pytest.mark.parametrize("what", ["tar", "counts"])
def test_a_disk_that_fails_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It costs no samples: the command fails, and the next time they may be there."""
    path = tmp_path / "00000.tar"
    write_tar(path, keyed(1, 2))
    write_stats(tmp_path / "00000_stats.json", 2)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((tarfile.ExFileObject, "read", fail) if what == "tar" else (Path, "read_bytes", fail)))
    with pytest.raises(OSError, match="Input/output error"):
        shard(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_sample_with_two_pictures(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "00000", {"000000001": sample(1) | {"png": jpeg(2)}})
    (found,) = img2dataset.read(tmp_path / ("00000.tar" if kind == "tar" else "00000"))
    assert isinstance(found, Sample)
    assert found.fault == "it has two pictures"
