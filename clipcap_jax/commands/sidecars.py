"""A text file for each picture: beside it, or below another folder."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipcap_jax import pictures
from clipcap_jax.errors import UserError, counted
from clipcap_jax.files import is_remote
from clipcap_jax.inputs.folders import Member


@dataclasses.dataclass(frozen=True)
class Sidecars:
    """Where the texts lie, and what becomes of those that are there already.

    Attributes:
      suffix: of their names, which are the pictures' but for it.
      existing: "skip", "overwrite", "append" or "prepend"; "" if there shall be none.
      folder: below which they lie as the pictures do below `root`; None: each beside its picture.
      root: the folder that all pictures have in common.
    """

    suffix: str
    existing: str
    folder: Path | None = None
    root: str = ""

    def path(self, picture: Path) -> Path:
        """Where the text of a picture lies."""
        if self.folder is None:
            return picture.with_suffix(self.suffix)
        return (self.folder / os.path.relpath(os.path.abspath(picture), self.root)).with_suffix(self.suffix)

    def journal(self, paths: Sequence[Path]) -> Path:
        """Where it is noted what is done, until all is: in the folder of the first text, which is made.

        Raises:
          UserError: that cannot be.
        """
        folder = self.path(paths[0]).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from error
        return folder / f"captions{self.suffix}.partial"

    def check(self, paths: Sequence[Path]) -> None:
        """That each picture has a text of its own, which is no picture.

        Raises:
          UserError: one has not.
        """
        if self.folder is None and any(isinstance(path, Member) for path in paths):
            raise UserError("--sidecar: pictures in a tar have no place beside them: name a folder with --output")
        named, inputs = set(), set(map(os.path.abspath, paths))
        for picture in paths:
            text = os.path.abspath(self.path(picture))
            if text in inputs:
                raise UserError(f"--sidecar {self.suffix}: {text} is one of the pictures: name another suffix")
            if text in named:
                raise UserError(f"--sidecar {self.suffix}: {picture} and another picture would both have {text}")
            named.add(text)

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        """The pictures without a text."""
        return [path for path in paths if not os.path.lexists(self.path(path))]

    def check_new(self, paths: Sequence[Path]) -> None:
        """That these pictures have no text yet, unless it was said what becomes of those.

        Raises:
          UserError: some have.
        """
        if self.existing:
            return
        there = [text for path in paths if os.path.lexists(text := self.path(path))]
        if there:
            raise UserError(
                f"{counted(len(there), 'text')} of {len(paths):,} are there already, the first {there[0]}: --existing "
                "skip, overwrite, append or prepend says what becomes of them"
            )

    def write(self, picture: Path, captions: Sequence[str], *, again: bool = False) -> None:
        """Write the text of a picture; it is as before or whole, even if the process is killed.

        Args:
          picture: its path.
          captions: the text, or what is added to it: one caption, or several, each on a line of its own.
          again: it may have been written already.

        Raises:
          UserError: it cannot be written.
        """
        path = self.path(picture)
        temporary = path.with_name(f".{path.name}.tmp")  # not by `files.whole`, whose place may be the journal's
        if len(captions) > 1:  # one that is drawn may have a line's end
            captions = [" ".join(caption.split()) for caption in captions]
        caption, between = "\n".join(captions), " " if len(captions) == 1 else "\n"
        try:
            before = ""
            if self.existing in ("append", "prepend") and path.exists():
                before = path.read_text("utf-8", "surrogateescape").strip()
            parts = [caption, before] if self.existing == "prepend" else [before, caption]
            has_it = before.startswith(caption) if self.existing == "prepend" else before.endswith(caption)
            if again and before and has_it:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(between.join(filter(None, parts)) + "\n", "utf-8", "surrogateescape")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error


def named(suffix: str, existing: str | None, folder: Path | None) -> Sidecars:
    """As the options say, before the pictures are known.

    Raises:
      UserError: it is no suffix, or one of pictures; no such folder can be.
    """
    if not re.fullmatch(r"\.\w+([.-]\w+)*", suffix) or Path("x" + suffix).suffix.lower() in {
        *pictures.SUFFIXES,
        ".tar",
    }:
        raise UserError(f"--sidecar {suffix}: a suffix such as .txt is needed, and none of pictures")
    if folder and (is_remote(folder) or (folder.exists() and not folder.is_dir())):
        raise UserError(f"--output {folder}: with --sidecar this names a folder on a disk")
    return Sidecars(suffix, existing or "", folder)


def below(sidecars: Sidecars, names: Sequence[str], paths: Iterable[Path]) -> Sidecars:
    """With the root of the pictures: the innermost folder that holds them all and the folders that were named."""
    folders = [os.path.abspath(name) for name in names if os.path.isdir(name)]
    folders += dict.fromkeys(os.path.dirname(os.path.abspath(path)) for path in paths)
    root = functools.reduce(lambda one, other: os.path.commonpath([one, other]), folders)
    return dataclasses.replace(sidecars, root=root)
