"""Pictures that lie on the web, beside those that are files."""

import functools
import http.client
import io
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from clipcap_jax import pictures
from clipcap_jax.errors import UserError

Picture = Path | str  # a str is an address

_CHUNK = 1 << 16  # bytes
_PAUSES = 1.0, 4.0  # seconds before a server is asked again
_HUNG_UP = ConnectionResetError, http.client.RemoteDisconnected, http.client.IncompleteRead


def picture(name: str) -> Picture:
    """What a name means: an address, which begins with http:// or https://, or else a path."""
    address = name.strip()
    return address if is_address(address) else Path(name)


def read(picture: Picture) -> bytes:
    """The bytes of a picture's file, wherever it lies.

    Raises:
      UserError: it cannot be fetched, or see `pictures.read`.
      TimeoutError, OSError: see `pictures.read`.
    """
    return pictures.read(picture) if isinstance(picture, Path) else _fetch(picture)


def is_address(name: str) -> bool:
    """Whether it begins with http:// or https://."""
    return name.lower().startswith(("http://", "https://"))


def _fetch(url: str) -> bytes:
    """What a server gives, within the limits of pictures; one that is busy, or hangs up, is asked again."""
    for pause in (*_PAUSES, None):
        try:
            return pictures.in_time(lambda: _get(url), "the server", url)
        except urllib.error.HTTPError as error:
            error.close()  # it is the response, too
            problem = f"the server answers {error.code} {error.reason}"
            passing = error.code == http.HTTPStatus.TOO_MANY_REQUESTS or error.code >= 500
        except TimeoutError:
            raise UserError(
                f"cannot be fetched within {pictures.limit(pictures.MAX_SECONDS)} seconds (the environment variable "
                f"{pictures.MAX_SECONDS})"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            problem, passing = str(reason), isinstance(reason, _HUNG_UP)
        if pause is None or not passing:
            break
        time.sleep(pause)
    raise UserError(f"cannot be fetched: {problem}")


def _get(url: str) -> bytes:
    parts = urllib.parse.urlsplit(url)
    if not parts.netloc.isascii():
        parts = parts._replace(netloc=parts.netloc.encode("idna").decode())
    # "é" and spaces, as browsers take them; in a list, what is no UTF-8 as it is.
    address = urllib.parse.quote(parts.geturl(), safe=string.punctuation, errors="surrogateescape")
    # Some servers give nothing to Python's own name.
    request = urllib.request.Request(address, headers={"User-Agent": "clipcap_jax"})
    seconds = pictures.limit(pictures.MAX_SECONDS)
    until = time.monotonic() + seconds
    with _opener().open(request, timeout=seconds) as response:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else 0
        data = pictures.read_stream(_Until(response, until), expected)
    if len(data) < expected:
        raise http.client.IncompleteRead(data, expected - len(data))
    return data


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http(s) alone: Python's own, which refuses file://, follows to ftp:// too."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_address(newurl):
            raise urllib.error.HTTPError(newurl, code, f"{msg} - Redirection to {newurl} is not allowed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Until(io.BytesIO):
    """A server's answer, which may come drop by drop, up to a moment of `time.monotonic`."""

    def __init__(self, response: http.client.HTTPResponse, until: float):
        super().__init__()
        self._response, self._until = response, until

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        data = bytearray()
        while len(data) < size and (chunk := self._response.read1(min(_CHUNK, size - len(data)))):
            data += chunk
            if time.monotonic() > self._until:
                raise TimeoutError
        return bytes(data)
