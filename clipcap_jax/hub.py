"""Files of pretrained models: on this machine, or on the Hugging Face hub."""

import contextlib
import functools
import threading
from pathlib import Path

from clipcap_jax.errors import UserError

CONFIG_FILES = ("config.json", "open_clip_config.json")
_PATIENCE = 4.0  # seconds that the hub has to answer in


def locate(source: str, files: tuple[str, ...]) -> Path:
    """The file that a path or a hub name stands for, on this machine.

    Args:
      source: a file; a folder with one of `files`; or a repository of the Hugging Face hub, such as "gpt2", which is
        downloaded to the hub's cache unless it is there. "gpt2@REVISION" asks for a branch, a tag or a commit (in its
        40 digits).
      files: its possible names; the first that is there is taken. `CONFIG_FILES` come with it.

    Raises:
      UserError: there is nothing of that name, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in files:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds none of {', '.join(files)}")
    # No names on the hub.
    if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt") or source.startswith(("/", ".", "~")):
        raise UserError(f"there is no file or folder {source}")
    return _download(source, files)


@functools.cache
def unreachable() -> str:
    """Why the hub cannot be reached, asked once for all; "": it can be.

    Its client tries for minutes, and warns at every try, where the files are not in its cache.
    """
    from huggingface_hub import constants, get_session

    reasons = [f"no answer within {_PATIENCE:.0f} seconds"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            reasons[0] = ""
        except Exception as error:  # in as many types as there are layers
            reasons[0] = str(error).partition("\n")[0] or type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)  # as nothing ends the look-up of a name
    asking.start()
    asking.join(_PATIENCE)
    return reasons[0]


def _download(source: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        return _download_first(source, files)
    except HFValidationError as error:
        raise UserError(f"there is no file or folder {source!r}, and it is no name on the Hugging Face hub") from error
    except RemoteEntryNotFoundError as error:
        raise UserError(f"{source} on the Hugging Face hub holds none of {', '.join(files)}") from error
    except Exception as error:  # of the network, in as many types as there are layers
        reason = unreachable() or str(error).partition("\n")[0]
        raise UserError(
            f"there is no file or folder {source!r}, and the Hugging Face hub did not give it: {reason}\n"
            "Offline, name a file or a folder."
        ) from error


def _download_first(source: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    name, _, revision = source.partition("@")
    cached = bool(unreachable())
    fetch = functools.partial(hf_hub_download, local_files_only=cached)
    for file in files:
        try:
            path = Path(fetch(name, file, revision=revision or None))
        except EntryNotFoundError:  # in the repository or, offline, in the cache
            if file == files[-1]:
                raise
            continue
        break
    for file in CONFIG_FILES:
        with contextlib.suppress(RemoteEntryNotFoundError):  # but one that cannot be had is an error
            fetch(name, file, revision=commit(path))
    if path.name.endswith(".index.json"):
        shards = path.name.removesuffix(".index.json").replace(".", "-*.")
        snapshot_download(name, revision=commit(path), allow_patterns=[shards], local_files_only=cached)
    return path


def commit(path: Path) -> str:
    """The revision of a file in the hub's cache, `.../snapshots/<commit>/<file>`; "" for any other file."""
    return path.parent.name if path.parent.parent.name == "snapshots" else ""


def pinned(source: str, path: Path) -> str:
    """A source with the revision that was found for it, so that the same weights can be had again."""
    return f"{source.partition('@')[0]}@{found}" if (found := commit(path)) else source
