"""Files of models: on this machine, or on the Hugging Face hub, where they can also be put."""

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from clipcap_jax.errors import UserError

CONFIG_FILES = ("config.json", "open_clip_config.json")
_PATIENCE = 4.0  # seconds that the hub has to answer in
_LOG_IN = "`hf auth login`, or the environment variable HF_TOKEN, says who you are"


class Absent(UserError):
    """A repository of the hub is there, but not this file of it."""


def is_name(text: str) -> bool:
    """Whether it has the form of a repository that somebody has on the hub, "user/name" or "user/name@REVISION"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?", text) is not None


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


def fetch(source: str, file: str) -> Path:
    """A file of a repository of the hub, in the hub's cache, where it is downloaded to unless it is there.

    Args:
      source: the repository, as `locate` takes it.
      file: its name there.

    Raises:
      Absent: the repository has no such file.
      UserError: there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    name, _, revision = source.partition("@")
    with _explained(source, (file,)):
        return Path(hf_hub_download(name, file, revision=revision or None, local_files_only=bool(unreachable())))


def _download(source: str, files: tuple[str, ...]) -> Path:
    with _explained(source, files):
        return _download_first(source, files)


@contextlib.contextmanager
def _explained(source: str, files: tuple[str, ...]) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"there is no file or folder {source!r}, and it is no name on the Hugging Face hub") from error
    except RemoteEntryNotFoundError as error:
        raise Absent(f"{source} on the Hugging Face hub holds none of {', '.join(files)}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no file or folder {source!r}, and the Hugging Face hub has no such repository, or it is "
            f"private: {_LOG_IN}"
        ) from error
    except Exception as error:  # of the network, in as many types as there are layers
        reason = unreachable() or str(error).partition("\n")[0]
        raise UserError(
            f"there is no file or folder {source!r}, and the Hugging Face hub did not give it: {reason}\n"
            "Offline, name a file or a folder."
        ) from error


def check_push(name: str, *, private: bool) -> tuple[str, set[str]]:
    """Before anything is made to be put there: that there is somebody to put it, and what is there already.

    Args:
      name: the repository, "user/name".
      private: whether nobody else may see it.

    Returns:
      The commit that is there, and the names of its files; "" where there is no such repository yet.

    Raises:
      UserError: it is no such name, there is no token, the hub cannot be reached, or the repository is public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not is_name(name) or "@" in name:
        raise UserError(f"{name!r} is no name of a repository on the Hugging Face hub: give user/name")
    if not get_token():
        raise UserError(f"there is no token of the Hugging Face hub: {_LOG_IN}. It has to be one that may write.")
    with _refused(name):
        try:
            found = HfApi().model_info(name, timeout=_PATIENCE)
        except RepositoryNotFoundError:
            return "", set()
    if private and not found.private:
        raise UserError(f"{name} is there and public: --private is for a new one. Make it private on the hub first.")
    return found.sha or "", {file.rfilename for file in found.siblings or ()}


def push(name: str, files: list[Path], *, after: str, private: bool, message: str) -> str:
    """Put files into a repository of the hub in one commit, in the place of those of their names.

    Args:
      name: the repository.
      files: where they are.
      after: the commit that `check_push` found: where more has happened since, nothing is done.
      private: whether nobody else may see a new repository.
      message: of the commit.

    Returns:
      The commit's address.

    Raises:
      UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _refused(name):
        api = HfApi()
        if not after:
            api.create_repo(name, private=private)
        added = [CommitOperationAdd(file.name, file) for file in files]
        return api.create_commit(name, added, commit_message=message, parent_commit=after or None).commit_url


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if lost := unreachable():
        raise UserError(f"the Hugging Face hub cannot be reached: {lost}")
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name of a repository on the Hugging Face hub: {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(
                f"the Hugging Face hub does not let you write to {name} with your token: {_LOG_IN}"
            ) from error
        raise UserError(f"the Hugging Face hub refuses {name}: {error.server_message or error}") from error
    except Exception as error:  # of the network, in as many types as there are layers; and of a card's metadata
        raise UserError(f"the Hugging Face hub did not take {name}: {error or type(error).__name__}") from error


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
