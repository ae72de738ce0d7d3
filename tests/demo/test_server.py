import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import IMAGE_SIZE, SPLITS

from clipcap_jax import pictures
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.datasets import shapes
from clipcap_jax.demo import server


def asked(uploads: Path, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """The status that a request gets, in two pieces, and the body that arrives behind the gate."""
    arrived = bytearray()
    sent: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = [{"body": body[:5], "more_body": True}, {"body": body[5:]}]

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            arrived.extend(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", **pieces.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(server.Gate(behind, uploads)({"type": "http", "path": path}, receive, send))
    assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(b"default-src 'self'")
    return sent[0]["status"], bytes(arrived)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/assets/index.js", 200),
        ("/gradio_api/upload", 200),
        ("/gradio_api/file=/folder/picture.png", 200),
        ("/gradio_api/file=http://elsewhere/picture.png", 404),
        ("/gradio_api/proxy=http://elsewhere/", 404),
        ("/gradio_api/info", 404),
        ("/gradio_api/runs", 404),
        ("/gradio_api/call/answer", 404),
        ("/monitoring", 404),
        ("/docs", 404),
    ],
)
def test_what_is_served(tmp_path: Path, path: str, status: int) -> None:
    assert asked(tmp_path, path)[0] == status


def test_only_uploaded_pictures_may_be_named(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    (uploads / "a").mkdir(parents=True)
    (uploads / "a" / "picture.png").touch()
    (tmp_path / "outside.png").touch()
    (uploads / "link.png").symlink_to(tmp_path / "outside.png")

    def status(path: Any) -> int:
        return asked(uploads, "/gradio_api/queue/join", json.dumps({"data": [{"path": path}, 5]}).encode())[0]

    assert status(str(uploads / "a" / "picture.png")) == 200
    assert status(None) == 200
    for path in (
        "/etc/passwd",
        f"{uploads}/a/../../outside.png",
        str(uploads / "link.png"),
        str(uploads / "a"),
        str(uploads / "a" / "gone.png"),
        "http://elsewhere/picture.png",
        "uploads/a/picture.png",
        f"{uploads}\0",
        ["/etc/passwd"],
    ):
        assert status(path) == 403


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_bodies(tmp_path: Path, path: str) -> None:
    (tmp_path / "picture.png").touch()
    inside = json.dumps(str(tmp_path / "picture.png"))
    good = f'{{"data": [{{"path": {inside}}}]}}'.encode()
    assert asked(tmp_path, path, good) == (200, good)
    for bad in (
        b"",
        b"[",
        b"[" * 60_000,
        f'{{"path": "/etc/passwd", "path": {inside}}}'.encode(),
        b'{"p\\u0061th": "/etc/passwd"}',
        b"[" + b" " * 70_000 + b"]",
    ):
        assert asked(tmp_path, path, bad) == (403, b"")


def test_examples(pixels_run: Path, tmp_path: Path) -> None:
    captioner = Captioner.load(pixels_run)
    own = server._write_examples(captioner, tmp_path)
    assert [pictures.decode(path.read_bytes()).size for path in own] == [(IMAGE_SIZE, IMAGE_SIZE)] * SPLITS["val"]
    config = captioner.metadata.config
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(tmp_path)))
    captioner.metadata = dataclasses.replace(captioner.metadata, config=elsewhere)
    drawn = server._write_examples(captioner, tmp_path)
    assert [pictures.decode(path.read_bytes()).size for path in drawn] == [(shapes.SIDE, shapes.SIDE)] * 6
