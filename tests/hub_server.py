"""A Hugging Face hub of this process, on 127.0.0.1, as far as its client asks it about models.

The protocol is that of huggingface_hub's own client, `hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from huggingface_hub import ModelCard

TOKEN = "hf_of_somebody"


@dataclasses.dataclass
class Repository:
    """`commits`: what each holds, by name; the newest last."""

    private: bool
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    @property
    def newest(self) -> str:
        return [*self.commits][-1]

    def commit(self, changes: dict[str, bytes]) -> str:
        """Make one more, with these files in it too; returns its name."""
        files = {**(self.commits[self.newest] if self.commits else {}), **changes}
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        return name


@dataclasses.dataclass
class Hub:
    """`repositories` by name; `asked`: what was asked for, such as "GET /user/name/resolve/main/config.json"; `large`:
    uploaded beside commits, by SHA-256."""

    address: str = ""
    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """A repository that somebody made."""
        self.repositories[name] = Repository(private=False)
        self.repositories[name].commit({".gitattributes": b"", **files})
        return self.repositories[name]


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        body = self._body()
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/":
            return self._answer(200)
        if path == "/api/validate-yaml":
            metadata = ModelCard(json.loads(body)["content"]).data.to_dict()
            wrong = metadata.get("license", "mit") not in ("mit", "apache-2.0")
            errors = [{"message": '"license" must be one of those there are'}] * wrong
            return self._answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        if path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = body
            return self._answer(200)
        if self.command == "POST" and not known:
            return self._answer(401, {"error": "Unauthorized"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.add(name, {}).private = asked.get("visibility", asked.get("private")) in (True, "private")
            return self._answer(200, {"url": f"{self.hub.address}/{name}"})
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None or (repository.private and not known):
            return self._answer(401 if match and not known else 404, {"error": "?"}, X_Error_Code="RepoNotFound")
        return self._of(repository, match[1], match[2] or "", body)

    def _of(self, repository: Repository, name: str, what: str, body: bytes) -> None:
        verb, _, rest = what.partition("/")
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._answer(200, {"files": modes})
        if what == "info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"objects": objects, "transfer": "basic"})
        if verb == "commit":
            return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        revision = rest.partition("/")[0] or "main"
        commit = repository.newest if revision == "main" else revision
        if verb in ("", "revision", "tree", "resolve") and commit not in repository.commits:
            return self._answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        held = repository.commits[commit]
        if verb in ("", "revision"):
            siblings = [{"rfilename": file} for file in held]
            return self._answer(
                200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            )
        if verb == "tree":
            return self._answer(
                200, [{"type": "file", "path": file, "size": len(held[file]), "oid": "0"} for file in held]
            )
        file = rest.partition("/")[2]
        if file not in held:
            return self._answer(404, {"error": "no such entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        tag = hashlib.sha256(held[file]).hexdigest()
        return self._answer(200, held[file], ETag=f'"{tag}"', X_Repo_Commit=commit)

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        header, changes = lines[0]["value"], {}
        if header.get("parentCommit", repository.newest) != repository.newest:
            return self._answer(412, {"error": "A commit has happened since"})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            else:
                changes[value["path"]] = base64.b64decode(value["content"])
        commit = repository.commit(changes)
        address = f"{self.hub.address}/{name}/commit/{commit}"
        return self._answer(200, {"commitUrl": address, "commitOid": commit, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815
