import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from web import Web

from clipcap_jax import pictures
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import addresses


def test_names() -> None:
    for name in ("http://a.example//b.jpg", "HTTPS://a.example/b.jpg?c=d#e"):
        assert addresses.picture(name) == name
    assert addresses.picture(" http://a.example/b.jpg\n") == "http://a.example/b.jpg"
    for name in ("http:/a", "file:///etc/passwd", "photos/http://a.jpg", ""):
        assert addresses.picture(name) == Path(name)


def test_wherever_it_lies(web: Web, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"here")
    web.files["é a.png"] = b"there"
    assert addresses.read(tmp_path / "a.png") == b"here"
    there = "%C3%A9%20a.png"
    for name in ("é a.png", there, "é a.png#part", f"?to={web.url(quote(there))}", f"?to=/{quote(there)}"):
        assert addresses.read(web.url(name)) == b"there", name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", r"cannot be fetched: the server answers 404 Not Found$"),
        ("a.png?huge", "has more than 1,073,741,824 bytes"),
        ("a.png?slow", "cannot be fetched within 1 seconds"),
        ("a.png?silent", "cannot be fetched within 1 seconds"),
        ("?to=file:///etc/passwd", "the server answers 302 .*file:///etc/passwd' is not allowed"),
        ("?to=ftp://127.0.0.1/a.png", "answers 302 Found - Redirection to ftp://127.0.0.1/a.png is not allowed"),
        ("?to=/?to=/", r"cannot be fetched: the server answers (302|404)"),
    ],
)
def test_servers_that_give_no_picture(web: Web, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pictures.MAX_SECONDS, "1")
    web.files = {"a.png": b"a picture"}
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        addresses.read(web.url(name))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("query", ["busy", "short"])
def test_a_server_is_asked_again(web: Web, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_PAUSES", (0.0, 0.0))
    web.files["a.png"] = b"a picture"
    assert addresses.read(web.url(f"a.png?{query}")) == b"a picture"
    web.asked.clear()
    monkeypatch.setattr(addresses, "_PAUSES", (0.0,))
    with pytest.raises(UserError, match=r"the server answers 503|3 bytes read, 6 more expected"):
        addresses.read(web.url(f"a.png?{query}"))
    with pytest.raises(UserError, match="404"):
        addresses.read(web.url("b.png"))
    assert web.asked["/b.png"] == 1  # which will not be there a moment later


def test_names_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look_up(host: str, *_: object) -> None:
        asked.append(host)
        raise OSError("nobody")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(UserError, match="cannot be fetched: nobody"):
        addresses.read("http://bücher.example:80/ä.png")
    assert asked == ["xn--bcher-kva.example"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://",
            "http:///a.png",
            "http://[::1/a.png",
            "https://127.0.0.1:x/a.png",
            "http://me:secret@127.0.0.1:9/",
        ),
        *(
            "http://127.0.0.1:9/\udcff.png",
            "http://127.0.0.1:9/a\0\n.png",
            f"http://{'a' * 70}.example/",
            "http://a..b/",
        ),
    ],
)
def test_addresses_where_nothing_is(url: str) -> None:
    with pytest.raises(UserError, match=r"^cannot be fetched: "):
        addresses.read(url)
