"""The page's server: what of Gradio's it lets through, and for how long it keeps what it is given."""

import contextlib
import importlib.util
import json
import logging
import os
import random
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipcap_jax import pictures
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.datasets import open_split, shapes
from clipcap_jax.demo import page
from clipcap_jax.errors import UserError

_EXAMPLES = 6
_MOST_BYTES = 32 * 2**20  # of an uploaded file
_MOST_ASKED = 2**16  # bytes of a request other than an upload

# All that the page asks for. Gradio has more: pages about its API, any address fetched, records of what was asked.
_SERVED = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/.+"
    r"|/gradio_api/(startup-events|upload|upload_progress|queue/data|cancel|reset|heartbeat/\w+|file=/.+)"
)
_ASKED = re.compile(r"/gradio_api/(queue/join|run/\w+)")  # with paths of pictures

# Nothing from elsewhere, whatever the page of Gradio may come to ask for; it needs what is called unsafe here.
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def check_installed() -> None:
    """Raise a `UserError` where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the page needs Gradio: pip install "clipcap_jax[demo]"')


def listen(host: str, port: int) -> socket.socket:
    """A socket for `serve`.

    Args:
      host: an address of this machine, or its name; "0.0.0.0" or "::" for all of them.
      port: 0 for any that is free.

    Raises:
      UserError: there is no such address here, or something listens there already.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"cannot listen on {host}, port {port}: {reason}. Name another with --port or --host."
        raise UserError(message) from error


def address(listening: socket.socket) -> str:
    """What to open in a browser."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(captioners: Mapping[str, Captioner], listening: socket.socket) -> None:
    """Serve the page until a signal ends it; then all that was uploaded is gone.

    Args:
      captioners: one or more, by what the page calls them; all read pictures.
      listening: see `listen`.
    """
    with _uploads() as uploads:
        import fastapi
        import gradio  # it makes folders in that of uploads when it is imported
        import uvicorn

        examples = _write_examples(next(iter(captioners.values())), uploads)
        gradio.set_static_paths(examples)  # which stay as long as the page, unlike uploads
        made = page.make(captioners, examples)
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gradio.mount_gradio_app(
            app,
            made,
            "/",
            theme=gradio.themes.Default(primary_hue="blue", secondary_hue="blue").set(**page.COLOURS),
            css=page.STYLE,
            max_file_size=min(_MOST_BYTES, pictures.limit(pictures.MAX_BYTES)),
            footer_links=[],
            # What environment variables of Gradio's could switch on, too.
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
        config = uvicorn.Config(Gate(app, uploads), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        # Who still has the page open in the end is cut off, which is no error.
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        server.run(sockets=[listening])


@contextlib.contextmanager
def _uploads() -> Iterator[Path]:
    """A temporary folder that Gradio puts uploads into."""
    with tempfile.TemporaryDirectory(prefix="clipcap-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)
        yield Path(folder).resolve()


def _write_examples(captioner: Captioner, folder: Path) -> list[Path]:
    """Pictures of the run's own data set, where that is here; otherwise drawings."""
    encoded = [shapes.render(shapes.draw_scene("test", i), random.Random(i)) for i in range(_EXAMPLES)]
    data = captioner.metadata.config.data
    with contextlib.suppress(UserError):
        found = open_split(data.name, "val", data.data_dir)[:_EXAMPLES]
        encoded = [example.image for example in found if example.image] or encoded
    paths = [folder / f"example-{i}.png" for i in range(1, len(encoded) + 1)]
    for path, picture in zip(paths, encoded, strict=True):
        pictures.decode(picture).save(path)
    return paths


class Gate:
    """An ASGI application before another one, Gradio's, that lets through what the page needs.

    A request may name a picture by its path. Gradio would copy any file of this machine, or fetch any address, into the
    folder of uploads, and from there give it out: only what is in that folder may be named.
    """

    def __init__(self, app: Any, uploads: Path):
        self._app, self._uploads = app, uploads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        if _ASKED.fullmatch(scope["path"]):
            body = await _read(receive)
            if not self._may_be_asked(body):
                await _refuse(send_guarded, 403, "The picture is not here any more: upload it again.")
                return
            receive = _again(body, receive)
        elif not _SERVED.fullmatch(scope["path"]):
            await _refuse(send_guarded, 404, "There is no such page.")
            return
        await self._app(scope, receive, send_guarded)

    def _may_be_asked(self, body: bytes) -> bool:
        def check(pairs: list[tuple[str, Any]]) -> None:
            for name, value in pairs:
                if name == "path" and value is not None and not self._is_upload(value):
                    raise ValueError

        try:
            json.loads(body, object_pairs_hook=check)
        except (ValueError, RecursionError):
            return False
        return True

    def _is_upload(self, path: Any) -> bool:
        return isinstance(path, str) and Path(path).is_file() and Path(path).resolve().is_relative_to(self._uploads)


async def _read(receive: Any) -> bytes:
    """A request's body; more than `_MOST_ASKED` bytes are cut off, which leaves no JSON."""
    body, more = b"", True
    while more and len(body) <= _MOST_ASKED:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body[:_MOST_ASKED]


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that begins with what was read already."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Any:
        return next(messages, None) or await receive()

    return replay


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
