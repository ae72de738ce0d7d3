"""The pictures that people name: files, folders, globs, addresses, lists of these, and tars of them."""

import codecs
import contextlib
import glob
import io
import os
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, NamedTuple

from clipcap_jax import pictures
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import addresses
from clipcap_jax.inputs.addresses import Picture


class Member(PosixPath):
    """A file in a tar that is not compressed: its path is the tar's with the name in it, and it is read like a file."""

    tar: Path
    start: int
    size: int

    @classmethod
    def of(cls, tar: Path, info: tarfile.TarInfo, total: int) -> "Member":
        """What lies in a tar of `total` bytes where the entry says."""
        member = cls(f"{tar}/{info.name}")
        member.tar, member.start = tar, info.offset_data
        member.size = max(0, min(info.size, total - info.offset_data))
        return member

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """As a file of this size."""
        return os.stat_result((stat.S_IFREG, *5 * (0,), self.size, *3 * (0,)))

    def read_bytes(self) -> bytes:
        """What it holds.

        Raises:
          OSError: the tar cannot be read.
        """
        with self.tar.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class Found(NamedTuple):
    """`paths`: each once, in order; `others`: what folders, globs and tars held beside them, counted by kind."""

    paths: list[Picture]
    others: Counter[str]


def find_pictures(inputs: Sequence[str]) -> Found:
    """The pictures that files, folders, with all below them, globs, addresses, lists and tars name.

    Of folders and globs, these are the files whose name or first bytes are those of a picture, through links too; of a
    `.tar`, those whose name is. "@" before a file's name, or "-", which is the standard input, stands for a list of
    files and addresses, one a line. What is named itself, or listed, is taken for a picture; a file that is listed need
    not be there.

    Raises:
      UserError: one of the inputs names nothing, or nothing with pictures.
    """
    found: dict[Picture, None] = {}
    others: Counter[str] = Counter()
    for name in inputs:
        here: Counter[str] = Counter()
        files = dict.fromkeys(_named(name, here))
        if not files:
            raise UserError(f"{name} holds no pictures" + (f": {described(here)}" if here else ""))
        found |= files
        others += here
    return Found(list(found), others)


def described(others: Counter[str]) -> str:
    """Counts by kind, the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())


def _named(name: str, others: Counter[str]) -> Iterable[Picture]:
    """The pictures of one input."""
    path = addresses.picture(name)
    if isinstance(path, str):
        return [path]
    if name == "-":
        return _unpacked(_lines(sys.stdin.buffer), others)
    if name.startswith("@"):
        try:
            return _unpacked(_lines(io.BytesIO(Path(name[1:]).read_bytes())), others)
        except OSError as error:
            raise UserError(f"the list {name[1:]} cannot be read: {error.strerror}") from error
    if path.is_dir():
        return _pictures(sorted(_files_below(path, others)), others)
    if path.exists():
        return _unpacked([path], others)
    files = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if not file.is_dir())
    if not files:
        raise UserError(f"there is no file, folder or glob {name!r}")
    return _pictures(_unpacked(files, others), others)


def _lines(file: IO[bytes]) -> Iterator[Picture]:
    """A path or an address a line; its bytes need not be UTF-8."""
    lines = (raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") for raw in file)
    return (addresses.picture(os.fsdecode(line)) for line in lines if line)


def _pictures(files: Iterable[Picture], others: Counter[str]) -> Iterator[Picture]:
    for file in files:
        if kind := "" if isinstance(file, Member | str) else _other(file):
            others[kind] += 1
        else:
            yield file


def _unpacked(files: Iterable[Picture], others: Counter[str]) -> Iterator[Picture]:
    """The files and addresses, and of tars the pictures in them."""
    for file in files:
        if isinstance(file, Path) and file.suffix == ".tar":
            yield from _members(file, others)
        else:
            yield file


def _members(path: Path, others: Counter[str]) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            total = path.stat().st_size
            tar = stack.enter_context(tarfile.open(path, "r:"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # on a damaged tar tarfile raises nearly anything
            raise UserError(f"{path} is no tar that can be read: {error}. Unpack it if it is compressed.") from error
        raw, end = stack.enter_context(path.open("rb")), total
        with contextlib.suppress(Exception):
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it holds them all
                if info.size < 0:
                    break  # it would lead back
                suffix = PurePosixPath(info.name).suffix.lower()
                if suffix in pictures.SUFFIXES and info.isfile() and not info.issparse():
                    yield Member.of(path, info, total)
                elif not info.isdir():
                    others[f"{suffix or 'without a suffix'} in tars"] += 1
            else:
                end = tar.offset
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            others["tars that are damaged or cut off"] += 1


def _files_below(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """All files, those that links to folders lead to among them; each folder once, whatever leads to it."""
    entered = set()

    def unreadable(_: OSError) -> None:
        others["unreadable folders"] += 1

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in entered:
            folders.clear()
            continue
        entered.add((found.st_dev, found.st_ino))
        folders.sort()  # so that of two ways to a folder it is always the same one that is taken
        yield from (Path(place, name) for name in names)


def _other(path: Path) -> str:
    """What kind of file it is, if no picture."""
    try:
        if not path.is_file():
            return "broken links" if path.is_symlink() and not path.exists() else "pipes and devices"
        if path.suffix.lower() in pictures.SUFFIXES:
            return ""
        with path.open("rb") as file:
            start = file.read(pictures.START)
    except OSError:
        return "unreadable files"
    if pictures.may_be_picture(start):
        return ""
    return path.suffix.lower() or "without a suffix"
