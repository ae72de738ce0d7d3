"""gs:// for tests, as a pytest plugin (see conftest.py): a folder that stands in for it, and an emulator where there is
one (`pip install gcp-storage-emulator gcsfs`)."""

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import needs
import pytest

# They have no types.
backend, gpath = map(importlib.import_module, ("etils.epath.backend", "etils.epath.gpath"))


class Folder:
    """A backend of etils.epath that keeps gs://bucket/ in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        def method(*arguments: Any, **options: Any) -> Any:
            local = [str(argument).replace("gs:/", str(self._folder)) for argument in arguments]
            found = getattr(backend.os_backend, name)(*local, **options)
            return [path.replace(str(self._folder), "gs:/") for path in found] if name == "glob" else found

        return method


@pytest.fixture
def folder_for_gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that is a folder of `tmp_path`."""
    folder = Folder(tmp_path)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", folder)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", [folder])
    (tmp_path / "bucket").mkdir()
    return "gs://bucket"


@pytest.fixture(scope="session")
def emulator() -> Iterator[Any]:
    """One for all tests, as Orbax and gcsfs keep connections to it; processes that tests start reach it too."""
    with pytest.MonkeyPatch.context() as patch:
        # Before gcsfs is imported, which asks by gRPC what kind of bucket it is, and for credentials at every call.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf.setdefault("gcs", {}), "token", "anon")
        needs.skip_without("gcsfs", "gcp_storage_emulator")
        import gcsfs  # noqa: F401
        from gcp_storage_emulator import server as emulator

        patch.setattr(emulator.objects, "download", with_generation(emulator.objects.download))
        with socket.create_server(("localhost", 0)) as free:
            address = f"http://localhost:{free.getsockname()[1]}"
        server = emulator.create_server("localhost", int(address.split(":")[-1]), in_memory=True)
        server.start()
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # as Google's libraries and gcsfs call it
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")  # or tensorstore looks for a service account
        yield server
        server.stop()


def with_generation(download: Any) -> Any:
    """As the emulator answers, and which version of the object it is, as Google Cloud Storage says.

    Without, tensorstore cannot write what it has read.
    """

    def answer(request: Any, response: Any, storage: Any) -> None:
        download(request, response, storage)
        if response.status != 404:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    return answer


@pytest.fixture
def emulated_gs(emulator: Any) -> Iterator[str]:
    """An empty bucket of the emulator."""
    import gcsfs
    from gcp_storage_emulator.handlers import buckets

    buckets.create_bucket("bucket", emulator._storage)
    yield "gs://bucket"
    emulator.wipe()
    gcsfs.GCSFileSystem.current().invalidate_cache()  # it knows what lay in the bucket


@pytest.fixture(params=["folder_for_gs", "emulated_gs"])
def gs(request: pytest.FixtureRequest) -> str:
    """A bucket."""
    name: str = request.getfixturevalue(request.param)
    return name
