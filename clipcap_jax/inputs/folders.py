"""The picture files that people name: files, folders and globs."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clipcap_jax import pictures
from clipcap_jax.errors import UserError


class Found(NamedTuple):
    """`paths`: each once, in order; `others`: what folders and globs held beside them, counted by kind."""

    paths: list[Path]
    others: Counter[str]


def find_pictures(inputs: Sequence[str]) -> Found:
    """The pictures that files, folders, with all below them, and globs name.

    Of folders and globs, these are the files whose name or first bytes are those of a picture, through links too; a
    file that is named itself is taken for one.

    Raises:
      UserError: one of the inputs names nothing, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    others: Counter[str] = Counter()
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = list(_files_below(path, others))
        elif path.exists():
            found[path] = None
            continue
        else:
            files = [file for file in map(Path, glob.glob(name, recursive=True)) if not file.is_dir()]
            if not files:
                raise UserError(f"there is no file, folder or glob {name!r}")
        kinds = {file: _other(file) for file in sorted(files)}
        here = Counter(filter(None, kinds.values()))
        if len(kinds) == here.total():
            raise UserError(f"{name} holds no pictures" + (f": {described(here)}" if here else ""))
        found |= {file: None for file, kind in kinds.items() if not kind}
        others += here
    return Found(list(found), others)


def described(others: Counter[str]) -> str:
    """Counts by kind, the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())


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
