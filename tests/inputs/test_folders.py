import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clipcap_jax.errors import UserError
from clipcap_jax.inputs import addresses
from clipcap_jax.inputs.addresses import Picture
from clipcap_jax.inputs.folders import find_pictures

PICTURES = 28


def test_files_folders_and_globs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything, others = find_pictures([str(photos)])
    assert len(everything) == PICTURES
    assert everything == sorted(everything)
    assert photos / "more [new]" / "00.PNG" in everything
    assert others == {".txt": 1}

    def paths(*names: object) -> list[Picture]:
        return find_pictures(list(map(str, names))).paths

    assert paths(photos / "0[1-3].png") == [photos / f"0{i}.png" for i in (1, 2, 3)]
    assert paths(photos / "**" / "*.PNG") == [photos / "more [new]" / "00.PNG"]
    # Brackets in a name that exists are not taken for a glob, and what is named is taken whatever its suffix.
    assert paths(photos / "more [new]") == [photos / "more [new]" / "00.PNG"]
    assert paths(photos / "notes.txt") == [photos / "notes.txt"]
    twice = paths(photos / "02.png", photos / "*2.png", photos)
    assert twice[0] == photos / "02.png"
    assert sorted(twice) == everything
    monkeypatch.chdir(photos)
    assert paths("03.png") == [Path("03.png")]


def test_pictures_are_found_by_name_or_content(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    for name, file_format in (
        ("a.jfif", "JPEG"),
        ("b", "PNG"),
        ("c.photo", "WEBP"),
        ("d.avif", "AVIF"),
        ("e.x", "TIFF"),
    ):
        picture.save(tmp_path / name, file_format)
    (tmp_path / "f.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "g").write_bytes(b"\0\0\0\x18ftypheic")  # which its message names
    (tmp_path / "h.jpg").write_bytes(b"")
    for name in ("i.txt", "j.TXT", "k", "l.mov", "m.ps"):
        (tmp_path / name).write_bytes(b"%!PS no picture")
    os.mkfifo(tmp_path / "n.jpg")
    (tmp_path / "o.jpg").symlink_to("gone.jpg")
    found, others = find_pictures([str(tmp_path)])
    assert [Path(path).name for path in found] == ["a.jfif", "b", "c.photo", "d.avif", "e.x", "f.HEIC", "g", "h.jpg"]
    assert others == {
        ".txt": 2,
        "without a suffix": 1,
        ".mov": 1,
        ".ps": 1,
        "pipes and devices": 1,
        "broken links": 1,
    }
    assert find_pictures([str(tmp_path / "*")]) == (found, others)


def test_links(photos: Path, tmp_path: Path) -> None:
    """Through links to folders, but never twice into one."""
    (photos / "elsewhere").symlink_to("../elsewhere")
    (photos / "more [new]" / "up").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(photos)
    shutil.copy(photos / "01.png", tmp_path / "elsewhere" / "linked.png")
    (photos / "again.png").symlink_to("01.png")
    found = find_pictures([str(photos)]).paths
    assert len(found) == PICTURES + 2
    assert {photos / "elsewhere" / "linked.png", photos / "again.png"} <= set(found)


def test_inputs_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no pictures$"):
        find_pictures([str(tmp_path)])
    for name in ("1.txt", "2.txt", "movie.mov"):
        (tmp_path / name).write_text("not a picture")
    with pytest.raises(UserError, match=r"holds no pictures: 2 \.txt, 1 \.mov"):
        find_pictures([str(tmp_path)])
    for name in ("gone.jpg", "*.jpg"):
        with pytest.raises(UserError, match="there is no file, folder or glob"):
            find_pictures([str(tmp_path / name)])


def test_tars(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their pictures, read where they lie; one that is cut off is told, one that is compressed refused."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("01.png", "notes.txt", "02.png"):
            tar.add(photos / name, f"../{name}")
    found, others = find_pictures(["a.tar"])
    assert list(map(str, found)) == ["a.tar/../01.png", "a.tar/../02.png"]
    assert [addresses.read(path) for path in found] == [(photos / name).read_bytes() for name in ("01.png", "02.png")]
    assert others == {".txt in tars": 1}
    whole = Path("a.tar").read_bytes()
    for size in (700, 3000, 3 * 1024):  # after the first picture, in the last one, and behind it
        Path("a.tar").write_bytes(whole[:size])
        assert find_pictures(["*.tar"]).others["tars that are damaged or cut off"] == 1
    Path("a.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"a.tar is no tar that can be read: .*Unpack it if it is compressed"):
        find_pictures(["a.tar"])


def test_lists(tmp_path: Path) -> None:
    lines = b"\xef\xbb\xbfa b.jpg\r\n\n\xff.png\na b.jpg\n https://a.example/b//c.tar \r\n"
    (tmp_path / "list").write_bytes(lines)
    listed = [Path("a b.jpg"), Path("\udcff.png"), "https://a.example/b//c.tar"]
    assert find_pictures([f"@{tmp_path}/list"]).paths == listed
    one = "http://a.example/*"
    assert find_pictures([one, f"@{tmp_path}/list", one]).paths == [one, *listed]
    (tmp_path / "list").write_bytes(b"\n")
    with pytest.raises(UserError, match="list holds no pictures"):
        find_pictures([f"@{tmp_path}/list"])
