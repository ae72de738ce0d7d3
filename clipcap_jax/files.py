"""Folders of files that are made once and from then on only read, files that lie elsewhere than on a disk, and JSON."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clipcap_jax.errors import UserError


def home() -> Path:
    """Where this user's caches lie: `~/.cache/clipcap_jax`, or where `XDG_CACHE_HOME` says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipcap_jax"


def once(name: str, homes: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """The folder `name` in the first of `homes` that holds it, made in the first that can be written to if none does.

    `write` gets a temporary folder, which gets its name when all is in it: what a crash leaves is never taken for it.
    Of several processes one writes, while the others wait.

    Raises:
      UserError: it could not be made: nothing can be written there, or the disk is full.
    """
    for folder in homes:
        with contextlib.suppress(OSError):  # it may be another user's
            if (folder / name).is_dir():
                return folder / name
    for folder in homes:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f".{name}.lock") as alone:
                _make(folder / name, write, alone=alone)
        except OSError:
            continue  # it cannot be written to
        return folder / name
    raise UserError(
        f"nothing can be written to {' or '.join(map(str, homes))}: set XDG_CACHE_HOME to a folder of yours"
    )


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock, which the system takes back when the process ends, however it does; false where there are none.

    The file stays: to remove it would let in a third process beside one that is just opening it.

    Raises:
      BlockingIOError: another process holds it, and this shall not `wait`.
      OSError: the file cannot be made.
    """
    with path.open("a") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # some network file systems
            alone = False
        yield alone


def _make(target: Path, write: Callable[[Path], None], *, alone: bool) -> None:
    if target.is_dir():
        return  # by the process that had the lock before
    if alone:
        for left in target.parent.glob(f".{target.name}.*.tmp"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        write(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or in a power cut the name might survive, but not all that it stands for
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise UserError(
            f"{target} could not be made: {error}. Mend that, for instance make room, and start again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_remote(path: Any) -> bool:
    """Whether a path of TFDS's (etils.epath) is such as gs://, which array_record cannot read and nothing can map."""
    return "://" in os.fspath(path)


def place(name: str | Path) -> Path:
    """What a name means: a `pathlib.Path`, or an `epath.Path` where it is such as gs://, which has the same methods.

    Raises:
      UserError: nothing is known of such places.
    """
    if not is_remote(name):
        return Path(name).expanduser()
    try:
        path: Path = epath.Path(name)
    except KeyError as error:
        raise UserError(f"{name}: nothing is known of {error.args[0]}; gs:// can be reached") from error
    return path


# What raises exceptions of its own where a store cannot be reached, or refuses.
_STORES = {"gcsfs", "google", "aiohttp", "requests", "s3fs", "botocore", "adlfs", "azure", "tensorflow"}


@contextlib.contextmanager
def reached(path: Any) -> Iterator[None]:
    """Whatever goes wrong on the way to a remote `path` is an OSError that says what, as it is on a disk.

    Raises:
      UserError: the package is missing that reaches it.
      OSError: as above; FileNotFoundError where something is not there.
    """
    try:
        yield
    except ImportError as error:
        if not is_remote(path):
            raise
        raise UserError(f"{path} cannot be reached: {error}. For gs:// pip install clipcap_jax[gcs].") from error
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not error.strerror:
            raise FileNotFoundError(errno.ENOENT, f"there is no such file or bucket ({error})") from error
        foreign = type(error).__module__.partition(".")[0] in _STORES
        if not is_remote(path) or not (foreign or isinstance(error, OSError)) or getattr(error, "strerror", None):
            raise
        raise OSError(errno.EREMOTEIO, str(error) or type(error).__name__) from error


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A file to write: `path` itself, or a temporary one that is copied to a remote `path` in the end, come what may.

    Raises:
      OSError: it cannot be copied.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, path.name)
        try:
            yield here
        finally:
            with reached(path):
                path.write_bytes(here.read_bytes())


def local_copy(path: Any, digest: str) -> Path:
    """The file itself, or the copy of a remote one, made once for all files with this SHA-256.

    Raises:
      UserError: the remote file has another one.
    """
    if not is_remote(path):
        return Path(path)
    name = f"{digest[:32]}-{path.name}"  # the same content may lie under two names
    return once(name, [home() / "files"], lambda folder: copy_checked(path, folder / path.name, digest)) / path.name


def copy_checked(path: Any, target: Path, sha256: str) -> None:
    """Copy a remote file.

    Raises:
      UserError: it has another SHA-256.
    """
    path.copy(target)
    if digest(target) != sha256:
        raise UserError(f"{path} is not what its data set says: it was damaged, or is being prepared anew. Try again.")


def digest(path: Any) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """As JSON, for a file in UTF-8: null where a number is not finite, and escapes for what UTF-8 does not have.

    Such are the bytes of a file's name that are no UTF-8, which Python reads as halves of characters.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_utf8(path: str | Path) -> None:
    """That all libraries can open what lies there.

    Raises:
      UserError: the name is no UTF-8, and those in C++ know no other.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: this name is no UTF-8, which what is written and read there has to be") from error


def check_new(*paths: Path, overwrite: bool) -> None:
    """Before anything is computed: that files to be written replace none, unless asked to.

    Raises:
      UserError: one is there already, is a folder, or cannot be looked for.
    """
    for path in paths:
        try:
            with reached(path):
                is_folder, is_there = path.is_dir(), path.exists()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        if is_folder:
            raise UserError(f"{path} is a folder: name another file")
        if is_there and not overwrite:
            raise UserError(f"{path} is there already: name another file, or replace it with --overwrite")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which is `path` in the end, or, if that fails, nothing.

    What is written to a store such as gs:// is there as a whole or not at all: there the place is `path` itself.

    Raises:
      UserError: it cannot be written.
    """
    from safetensors import SafetensorError

    if is_remote(path):
        yield path
        return
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.rename(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError as torch wraps them
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        elif partial.exists():
            partial.unlink()
