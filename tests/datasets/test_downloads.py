import hashlib
import http.server
import io
import json
import random
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import Clipcap

from clipcap_jax import files
from clipcap_jax.datasets import downloads, nocaps, open_split
from clipcap_jax.datasets.downloads import Remote, download, download_karpathy, download_nocaps, unpack
from clipcap_jax.datasets.readers import TextFile
from clipcap_jax.errors import UserError

CONTENT = random.Random(0).randbytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `faults` are spent one a request: how many bytes to send before the connection breaks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[int] = []
        self.ranges = True
        self.requests: list[tuple[str, str]] = []  # path and Range

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has had enough hangs up

    def remote(self, name: str, **changes: Any) -> Remote:
        data = self.files.get(f"/{name}", b"")
        known: dict[str, Any] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
        return Remote(self.url(name), **known)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append((self.path, wanted))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if self.path not in self.server.files:
            self.send_error(404)
            return
        if fault == -503:
            self.send_error(503)
            return
        data = self.server.files[self.path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(data) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:] if fault is None else data[start : start + fault])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with Server() as server:
        server.files["/a.bin"] = CONTENT
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def names(folder: Path) -> list[str]:
    """Of all files but the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".download.lock"]
    return sorted(str(path.relative_to(folder)) for path in files)


def test_download(server: Server, tmp_path: Path) -> None:
    path = download(server.remote("a.bin"), tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["new/folder/a.bin"]
    assert download(server.remote("a.bin"), path.parent) == path  # no second request
    assert server.requests == [("/a.bin", "")]


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.faults = [1_000_000, -503, 500_000]
    assert download(server.remote("a.bin"), tmp_path).read_bytes() == CONTENT
    wanted = [start for _, start in server.requests]
    assert wanted == ["", "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]


def test_it_goes_on_in_another_run(server: Server, tmp_path: Path) -> None:
    server.faults = [400_000] * downloads.TRIES
    with pytest.raises(UserError, match=r"broke 5 times.*Run the same command again: it goes on"):
        download(server.remote("a.bin"), tmp_path)
    assert names(tmp_path) == ["a.bin.part"]
    server.requests.clear()
    assert download(server.remote("a.bin"), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/a.bin", "bytes=2000000-")]
    assert names(tmp_path) == ["a.bin"]


def test_it_was_complete_but_not_yet_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert download(server.remote("a.bin"), tmp_path).read_bytes() == CONTENT
    assert server.requests == []


def test_a_server_that_ignores_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.faults = [1_000_000]
    assert download(server.remote("a.bin"), tmp_path).read_bytes() == CONTENT
    assert [start for _, start in server.requests] == ["", "bytes=1000000-"]


def test_a_server_whose_file_has_become_shorter(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(bytes(2_900_000))
    remote = server.remote("a.bin")
    server.files["/a.bin"] = CONTENT[:100]
    with pytest.raises(UserError, match="broke 5 times"):
        download(remote, tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x", b"x" + CONTENT * 2])
def test_a_file_that_is_another(server: Server, tmp_path: Path, content: bytes) -> None:
    remote = server.remote("a.bin")
    server.files["/a.bin"] = content
    with pytest.raises(UserError, match=r"is not the file that was published.*It was deleted"):
        download(remote, tmp_path)
    assert names(tmp_path) == []


def test_a_start_that_belongs_to_another_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="not the file that was published"):
        download(server.remote("a.bin"), tmp_path)
    assert download(server.remote("a.bin"), tmp_path).read_bytes() == CONTENT


def test_a_file_in_the_way(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"half")
    with pytest.raises(UserError, match=r"a.bin has 4 bytes, not 3,000,000. Delete it"):
        download(server.remote("a.bin"), tmp_path)


def test_what_cannot_be_had(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.bin cannot be downloaded: HTTP Error 404"):
        download(server.remote("none.bin", size=5), tmp_path)
    assert len(server.requests) == 1  # not again and again
    with pytest.raises(UserError, match=r"broke 5 times.*refused"):
        download(Remote("http://127.0.0.1:9/a.bin", 5, ""), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        download(server.remote("a.bin"), tmp_path / "file")


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("train2014")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_unpack(tmp_path: Path) -> None:
    files = {f"train2014/{index}.jpg": bytes([index]) * 5000 for index in range(5)}
    (tmp_path / "a.zip").write_bytes(zipped(files))
    out = tmp_path / "out"
    (out / "train2014").mkdir(parents=True)
    (out / "train2014" / "0.jpg").write_bytes(b"\1" * 5000)  # there already
    (out / "train2014" / "1.jpg").write_bytes(b"\1" * 4000)  # not whole
    (out / "train2014" / "2.jpg.part").write_bytes(b"\1")
    unpack(tmp_path / "a.zip", out)
    expected = files | {"train2014/0.jpg": b"\1" * 5000}
    assert {name: (out / name).read_bytes() for name in names(out)} == expected


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\..\\x"])
def test_a_zip_that_would_write_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"good": b"1", name: b"2"}))
    with pytest.raises(UserError, match="would write outside"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


def test_a_broken_zip(tmp_path: Path) -> None:
    data = bytearray(zipped({"a": random.Random(0).randbytes(5000)}))
    data[2000] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert "out/a" not in names(tmp_path)
    (tmp_path / "a.zip").write_bytes(data[:1000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_file_without_a_name_in_a_zip(tmp_path: Path) -> None:
    data = zipped({"a": b"1"}).replace(b"PK\1\2", b"PK\1\2", 1)
    directory = data.index(b"PK\1\2")
    nameless = bytearray(data[:directory] + data[directory : directory + 46] + data[directory + 47 :])
    nameless[directory + 28] = 0
    nameless[nameless.index(b"PK\5\6") + 12] -= 1  # the directory's size
    (tmp_path / "a.zip").write_bytes(nameless)
    with pytest.raises(UserError, match=r"cannot be unpacked|would write outside"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("fault", ["the deflated stream", "encrypted", "an unknown method"])
def test_a_zip_that_cannot_be_unpacked(tmp_path: Path, fault: str) -> None:
    """Whether its pictures are unpacked, or a file is read where it lies."""
    data = bytearray(zipped({"a.json": b'{"words": "again and again"} ' * 1000}))
    entry = data.index(b"PK\1\2", data.index(b"a.json"))  # of the directory at the end
    while data[entry + 46 : entry + 52] != b"a.json":
        entry = data.index(b"PK\1\2", entry + 4)
    start = data.index(b"a.json") + len("a.json")
    if fault == "encrypted":
        data[entry + 8] |= 1
        data[data.index(b"a.json") - 30 + 6] |= 1
    elif fault == "an unknown method":
        data[entry + 10] = data[data.index(b"a.json") - 30 + 8] = 97
    else:
        data[start : start + 20] = b"\xff" * 20
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert "out/a.json" not in names(tmp_path)
    with pytest.raises(UserError, match=r"a.zip: a.json cannot be read: .* Copy or download a.zip again"):
        TextFile(tmp_path / "a.zip", "a.json").read()


def test_coco(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/caption_datasets.zip"] = zipped({"dataset_coco.json": b"{}"})
    server.files["/train2014.zip"] = zipped({"train2014/1.jpg": b"1", "train2014/2.jpg": b"2"})
    monkeypatch.setattr(downloads, "KARPATHY", server.remote("caption_datasets.zip"))
    monkeypatch.setattr(downloads, "COCO_PICTURES", {"train2014": (server.remote("train2014.zip"), 2)})
    download_karpathy(tmp_path, "coco")
    assert names(tmp_path) == ["caption_datasets.zip"]
    download_karpathy(tmp_path, "coco", pictures=True)
    (tmp_path / "train2014.zip").unlink()
    download_karpathy(tmp_path, "coco", pictures=True)  # it is all there
    assert names(tmp_path) == ["caption_datasets.zip", "train2014/1.jpg", "train2014/2.jpg"]
    assert len(server.requests) == 2


def test_nocaps_pictures(server: Server, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "JPEG")
    good = file.getvalue()
    server.files |= {"/1.jpg": good, "/2.jpg": good, "/page.jpg": b"<html>", "/cut.jpg": good[:-100]}
    entries: list[dict[str, Any]] = [
        {"coco_url": server.url(f"{name}.jpg"), "file_name": f"{name}.jpg"}
        for name in ("1", "2", "none", "page", "cut")
    ]
    entries += [{"coco_url": "file:///etc/passwd", "file_name": "p.jpg"}]
    entries += [{"coco_url": server.url("1.jpg"), "file_name": "../x.jpg"}, {}]
    with pytest.raises(UserError, match="does not hold nocaps"):
        download_nocaps(tmp_path)
    (tmp_path / nocaps.FILES["val"]).write_text(json.dumps({"images": entries}))
    problems = download_nocaps(tmp_path, workers=4)
    assert names(tmp_path) == [nocaps.FILES["val"], "val/1.jpg", "val/2.jpg"]
    assert (tmp_path / "val" / "1.jpg").read_bytes() == good
    assert [problem.where.split()[1] for problem in problems] == [f"images[{index}]" for index in range(2, 8)]
    server.requests.clear()
    assert len(download_nocaps(tmp_path)) == 6
    assert not any(path in ("/1.jpg", "/2.jpg") for path, _ in server.requests)


def test_nothing_is_prepared_of_half_a_download(
    server: Server, tmp_path: Path, clipcap: Clipcap, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    server.files["/1.jpg"] = file.getvalue()
    images = [
        {"id": i, "coco_url": server.url(f"{i}.jpg"), "file_name": f"{i}.jpg", "domain": "in-domain"} for i in (1, 2)
    ]
    annotations = [{"image_id": i, "caption": "A dog."} for i in (1, 2)]
    (tmp_path / nocaps.FILES["val"]).write_text(json.dumps({"images": images, "annotations": annotations}))
    command = ("prepare", "nocaps", "--manual-dir", tmp_path, "--data-dir", tmp_path / "data", "--processes", 1)
    assert clipcap(*command, "--download-images") == 2
    printed = capsys.readouterr().err
    assert "1 pictures could not be fetched. Run this again to try again, or without --download-images" in printed
    assert "images[1]: not fetched" in printed
    assert not (tmp_path / "data").exists()

    assert clipcap(*command, "--max-skipped", 0.5) == 0  # as the message says
    assert [example.image_id for example in open_split("nocaps", "val", str(tmp_path / "data"))] == ["1"]
    server.files["/2.jpg"] = file.getvalue()
    other = (*command[:5], tmp_path / "other", *command[6:])
    assert clipcap(*other, "--download-images") == 0
    assert len(open_split("nocaps", "val", str(tmp_path / "other"))) == 2


def test_two_downloads_at_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / nocaps.FILES["val"]).write_text(json.dumps({"images": []}))
    with files.locked(tmp_path / ".download.lock"):
        for work in (download_nocaps, lambda folder: download_karpathy(folder, "coco")):
            with pytest.raises(UserError, match=f"another process is downloading to {tmp_path}"):
                work(tmp_path)
    assert server.requests == []
