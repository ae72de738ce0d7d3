"""Writing a data set in the schema, and the summary of what was kept and skipped."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clipcap_jax.datasets import schema
from clipcap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why something in the user's files was skipped."""

    where: str  # file and line: "captions.jsonl:17"
    reason: str  # its kind, by which the summary counts: "image missing"
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a prepared data set holds; `rich.print` shows it as a table.

    Attributes:
      name: the data set, such as "records/flickr8k".
      folder: where it lies.
      images: pictures (or their embeddings) kept, by split.
      captions: captions kept, by split.
      problems: what was skipped, one by one.
      notes: what else the user should know, such as fields that were not used.
      already_prepared: nothing was written this time.
    """

    name: str
    folder: str
    images: Mapping[str, int]
    captions: Mapping[str, int]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    already_prepared: bool = False

    @property
    def skipped(self) -> dict[str, int]:
        """How often something was skipped, by reason, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def __rich__(self) -> RenderableType:
        state = "was prepared before, nothing to do" if self.already_prepared else "is prepared"
        table = Table("split", "images", "captions")
        for split, images in self.images.items():
            table.add_row(split, f"{images:,}", f"{self.captions[split]:,}")
        lines = [f"skipped {count:,}: {reason}" for reason, count in self.skipped.items()]
        lines += [f"  {problem}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            lines.append(f"  and {len(self.problems) - 10:,} more, all in {self.folder}/metadata.json")
        lines += [f"note: {note}" for note in self.notes]
        return Group(Text(f"{self.name} {state}: {self.folder}"), table, *map(Text, lines))


class Builder(tfds.core.GeneratorBasedBuilder):
    """What the builders share: the file format, and that TFDS prints nothing (the progress bar and the summary do)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, data_dir: str, **options: Any) -> None:
        super().__init__(**{"data_dir": data_dir, "file_format": schema.FILE_FORMAT} | options)

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        return builder_config

    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def metadata(
    source: Mapping[str, Any],
    captions: Mapping[str, int],
    encoder: str | None = None,
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> tfds.core.MetadataDict:
    """What is stored beside the examples, for `Summary` and `find_prepared`.

    Args:
      source: all that decides the content, as JSON values.
      captions: captions kept, by split.
      encoder: what made the embeddings.
      problems: what was skipped.
      notes: what else the user should know.
    """
    return tfds.core.MetadataDict(
        source=dict(source),
        captions=dict(captions),
        encoder=encoder,
        problems=[dataclasses.astuple(problem) for problem in problems],
        notes=list(notes),
    )


def write(builder: Builder) -> Summary:
    """Writes the data set, all of it or nothing: TFDS renames a temporary folder once everything is in it.

    Raises:
      UserError: a file could not be read or written.
    """
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"{builder.info.full_name} could not be prepared in {builder.data_dir}: {error}") from error
    finally:
        tfds.enable_progress_bar()
    return _summary(builder)


def find_prepared(name: str, data_dir: str, source: Mapping[str, Any]) -> Summary | None:
    """The summary of the data set if it is prepared already, None if it is not.

    Raises:
      UserError: it was prepared from another `source`.
    """
    folder = tfds.core.Path(data_dir).expanduser() / name / str(Builder.VERSION)
    if not folder.exists():
        return None
    builder = tfds.builder_from_directory(folder)
    before, now = builder.info.metadata.get("source", {}), json.loads(json.dumps(source))
    if before != now:
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        changes = "; ".join(f"{key} was {before.get(key)}, is now {now.get(key)}" for key in keys)
        raise UserError(
            f"{name} was prepared before, but from something else: {changes}. "
            f"Delete {folder} to prepare it again, or choose another name or data_dir."
        )
    return dataclasses.replace(_summary(builder), already_prepared=True)


def _summary(builder: tfds.core.DatasetBuilder) -> Summary:
    stored = builder.info.metadata
    return Summary(
        name=builder.info.full_name.rsplit("/", 1)[0],
        folder=str(builder.info.data_dir),
        images={split: builder.info.splits[split].num_examples for split in stored["captions"]},
        captions=dict(stored["captions"]),
        problems=tuple(Problem(*problem) for problem in stored["problems"]),
        notes=tuple(stored["notes"]),
    )
