import importlib.machinery
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import types
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import needs
import pytest
from tiny import Clipcap, Source

from clipcap_jax.captioning.captioner import Captioner


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed."""
    module = types.ModuleType("gradio")
    module.__spec__ = importlib.machinery.ModuleSpec("gradio", None)
    monkeypatch.setitem(sys.modules, "gradio", module)


@pytest.mark.usefixtures("gradio")
def test_a_model_that_reads_no_pictures(
    clipcap: Clipcap, embeddings_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clipcap("demo", embeddings_run, "--port=0") == 2
    assert f"{embeddings_run} captions embeddings of width 5 from mean colour, not pictures" in capsys.readouterr().err


@pytest.mark.usefixtures("gradio")
def test_a_port_that_is_taken(clipcap: Clipcap, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert clipcap("demo", tmp_path, f"--port={port}") == 2
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    assert clipcap("demo", tmp_path, "--port=65536") == 2
    assert "'65536' is not a number from 0 to 65535" in capsys.readouterr().err
    assert clipcap("demo", tmp_path, "--host=no.such.host.invalid") == 2
    assert "cannot listen on no.such.host.invalid, port 7860: " in capsys.readouterr().err


def test_without_gradio(
    clipcap: Clipcap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert clipcap("demo", tmp_path) == 2
    assert 'pip install "clipcap_jax[demo]"' in capsys.readouterr().err


class Demo:
    """The command, as a process that keeps what is uploaded below `temporary`; with options of `Popen`'s."""

    def __init__(self, temporary: Path, *arguments: str | Path, **options: Any):
        command = [sys.executable, "-m", "clipcap_jax", "demo", "--port=0", *map(str, arguments)]
        environment = os.environ | {"TMPDIR": str(temporary), "COLUMNS": "200"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)
        assert self.process.stdout
        told = self.process.stdout.readline()
        [self.address] = re.findall(r"The page is at (http://127\.0\.0\.1:\d+); Ctrl-C ends it", told)
        self.get("/")  # waits until it is served

    def get(self, path: str, body: str | None = None) -> tuple[int, str]:
        """The status and the body of an answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, body.encode() if body else None, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def demo(pixels_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A run's last checkpoint, and beside it an earlier one."""
    needs.skip_without("gradio", "playwright", "axe_playwright_python", "chromium")
    checkpoints = ("--checkpoint=200", "--other-checkpoint=100")
    started = Demo(tmp_path_factory.mktemp("temporary"), pixels_run, pixels_run, *checkpoints)
    with started.process:
        yield started
        started.process.kill()


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in 200 kB."""
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(100 * 5001)) for _ in range(400)) + packer.flush()
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)  # a bit for each pixel
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def upload(page: Any, picture: Path) -> None:
    if (remove := page.get_by_label("Remove Image")).count():
        remove.click()
    page.locator("input[type=file]").first.set_input_files(picture)


def enter(page: Any, setting: str, value: str) -> None:
    page.get_by_label(f"number input for {setting}").fill(value)


def rows(page: Any, count: int, section: int = 0) -> list[list[str]]:
    """What the table of a checkpoint says, as soon as it has so many captions."""
    from playwright.sync_api import expect

    found = page.locator(".clipcap-results section").nth(section).locator("tbody tr")
    expect(found).to_have_count(count, timeout=60_000)
    return [row.locator("td").all_inner_texts() for row in found.all()]


@pytest.mark.slow
def test_captions_of_an_uploaded_picture(demo: Demo, pixels_run: Path, source: Source) -> None:
    picture = source.pictures / "03.png"
    captioner = Captioner.load(pixels_run, 200)
    with browser.opened(demo.address) as page:
        upload(page, picture)
        found = rows(page, 5)
        assert [row[0] for row in found] == [caption.text for caption in captioner.caption(picture, n=5)]
        assert sum(float(share.rstrip("%")) for _, share, _ in found) == pytest.approx(100, abs=0.3)
        earlier = Captioner.load(pixels_run, 100).caption(picture, n=5)
        assert [row[0] for row in rows(page, 5, section=1)] == [caption.text for caption in earlier]

        enter(page, "Captions", "2")
        enter(page, "Beam", "4")
        page.get_by_role("button", name="Search", exact=True).click()
        searched = captioner.caption(picture, n=2, beam_size=4)
        assert [row[::2] for row in rows(page, 2)] == [[caption.text, f"{caption.score:.3f}"] for caption in searched]

        enter(page, "Captions", "1")
        page.get_by_role("tab", name="Draw by chance").click()
        page.get_by_label("Seed").fill("1")
        page.get_by_role("button", name="Draw", exact=True).click()
        drawn = captioner.caption(picture, temperature=1.0, top_p=0.9, seed=1)
        assert [row[0] for row in rows(page, 1)] == [drawn.text]


@pytest.mark.slow
def test_files_that_are_refused(demo: Demo, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    with browser.opened(demo.address) as page:
        for data, message in (
            (b"no picture", "Not an image that can be read here: it starts with b'no picture'."),
            (bomb(), "The image is too large: it has more than 89,478,485 pixels."),
        ):
            picture.write_bytes(data)
            upload(page, picture)
            page.get_by_role("alert").filter(has_text=message).first.wait_for()
        picture.write_bytes(bytes(33 * 2**20))
        upload(page, picture)
        page.get_by_text("exceed the maximum allowed size of 32.0 Mb").first.wait_for()
        page.get_by_role("button", name="Example").first.click()
        rows(page, 5)


@pytest.mark.slow
def test_by_keyboard_alone(demo: Demo, source: Source) -> None:
    with browser.opened(demo.address) as page:
        browser.tab_to(page, page.get_by_role("button", name=re.compile("upload", re.IGNORECASE)).first)
        choosers: list[Any] = []
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        for _ in range(60):  # the page is drawn before it listens
            if not choosers:
                page.keyboard.press("Enter")
                page.wait_for_timeout(1000)
        choosers[0].set_files(source.pictures / "03.png")
        rows(page, 5)
        browser.tab_to(page, page.get_by_label("range slider for Captions"))
        page.keyboard.press("ArrowLeft")
        browser.tab_to(page, page.get_by_role("button", name="Search", exact=True))
        page.keyboard.press("Enter")
        rows(page, 4)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_for_everyone(demo: Demo, source: Source, width: int) -> None:
    """No scrolling to the side on a phone, and nothing that a screen reader stumbles over."""
    with browser.opened(demo.address, width=width) as page:
        page.get_by_role("button", name="Search", exact=True).wait_for()
        assert browser.serious_faults(page) == []
        upload(page, source.pictures / "03.png")
        rows(page, 5)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert browser.serious_faults(page) == []


@pytest.mark.slow
def test_only_uploaded_files_can_be_read(demo: Demo, pixels_run: Path) -> None:
    secret = pixels_run / "config.json"
    for path in (secret, "/etc/passwd", f"{Path.cwd()}/setup.cfg", "/proc/self/environ"):
        assert demo.get(f"/gradio_api/file={path}")[0] == 403
        body = f'{{"data": [{{"path": "{path}", "meta": {{"_type": "gradio.FileData"}}}}], "fn_index": 0}}'
        assert demo.get("/gradio_api/queue/join", body)[0] == 403
        assert demo.get("/gradio_api/run/predict", body)[0] == 403
    for path in ("/gradio_api/info", "/gradio_api/openapi.json", "/docs", "/gradio_api/proxy=http://127.0.0.1:1/"):
        assert demo.get(path)[0] == 404


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_behind(number: signal.Signals, pixels_run: Path, tmp_path: Path) -> None:
    needs.skip_without("gradio")
    # A process hears of Ctrl-C only if this one does, which it does not where a shell runs all in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        demo = Demo(tmp_path, pixels_run, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.rglob("example-1.png"))
    with demo.process, urllib.request.urlopen(f"{demo.address}/gradio_api/heartbeat/x", timeout=60):  # an open page
        demo.process.send_signal(number)
        try:
            _, errors = demo.process.communicate(timeout=10)
        finally:
            demo.process.kill()
    assert (demo.process.returncode, errors) == (128 + number, "Stopped.\n")
    assert not list(tmp_path.iterdir())
