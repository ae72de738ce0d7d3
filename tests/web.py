"""A server of pictures on 127.0.0.1, and what is wrong with others on the web."""

import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest


class Web(http.server.ThreadingHTTPServer):
    """Serves `files`, by paths as their addresses have them, and where a query says so does it badly:

    "?huge" claims a terabyte, "?slow" sends drop by drop, "?silent" even the answer's head, "?to=ADDRESS" leads there;
    "?busy" and "?short" give what they ought to when they are asked for the third time.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has had enough hangs up

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        data = self.server.files.get(path[1:])
        self.server.asked[self.path] += 1
        early = self.server.asked[self.path] < 3
        if query == "busy" and early:
            self.send_error(503)
        elif query == "silent":
            self._drip(b"HTTP/1.0 200 OK\r\n")
        elif query.startswith("to="):
            self.send_response(302)
            self.send_header("Location", query[3:])
            self.end_headers()
        elif data is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(10**12 if query == "huge" else len(data)))
            self.end_headers()
            if query == "slow":
                self._drip(data)
            else:
                self.wfile.write(data[:3] if query == "short" and early else data)

    def _drip(self, data: bytes) -> None:
        for byte in data:
            self.wfile.write(bytes([byte]))
            time.sleep(0.3)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    """A server that runs."""
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
