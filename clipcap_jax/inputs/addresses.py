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


def picture(name: str) -> Picture:
    """What a name means: an address, which begins with http:// or https://, or else a path."""
    return name if _is_address(name) else Path(name)


def read(picture: Picture) -> bytes:
    """The bytes of a picture's file, wherever it lies.

    Raises:
      UserError: it cannot be fetched, or see `pictures.read`.
      TimeoutError, OSError: see `pictures.read`.
    """
    return pictures.read(picture) if isinstance(picture, Path) else _fetch(picture)


def _is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _fetch(url: str) -> bytes:
    """What a server gives, within the limits of pictures."""
    try:
        return pictures.in_time(lambda: _get(url), "the server", url)
    except urllib.error.HTTPError as error:
        error.close()  # it is the response, too
        raise UserError(f"cannot be fetched: the server answers {error.code} {error.reason}") from None
    except TimeoutError:
        raise UserError(
            f"cannot be fetched within {pictures.limit(pictures.MAX_SECONDS)} seconds (the environment variable "
            f"{pictures.MAX_SECONDS})"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"cannot be fetched: {getattr(error, 'reason', error)}") from None


def _get(url: str) -> bytes:
    # "é" and spaces, as browsers take them; in a list, what is no UTF-8 as it is.
    address = urllib.parse.quote(url, safe=string.punctuation, errors="surrogateescape")
    # Some servers give nothing to Python's own name.
    request = urllib.request.Request(address, headers={"User-Agent": "clipcap_jax"})
    seconds = pictures.limit(pictures.MAX_SECONDS)
    until = time.monotonic() + seconds
    with _opener().open(request, timeout=seconds) as response:
        length = response.headers.get("Content-Length", "")
        return pictures.read_stream(_Until(response, until), int(length) if length.isdecimal() else 0)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http(s) alone: Python's own, which refuses file://, follows to ftp:// too."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not _is_address(newurl):
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
