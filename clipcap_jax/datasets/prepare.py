"""Preparing a data set: its shards are written in several processes, what was kept and skipped is told."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from clipcap_jax import files
from clipcap_jax.datasets import beam as on_beam
from clipcap_jax.datasets import page, schema
from clipcap_jax.datasets.processes import end_with_parent
from clipcap_jax.datasets.shards import VERSION, Shard, Writer, changes, same_but, sweep, upload
from clipcap_jax.datasets.source import Part, Problem, Source, first_problems
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.errors import UserError
from clipcap_jax.progress import track

_SAMPLES = 12  # pictures of each split on the page
_STORED_PROBLEMS = 100  # in metadata.json, which is read whenever the data set is opened; problems.jsonl has all


def prepare(
    source: Source,
    data_dir: str,
    *,
    max_skipped: float = 0.01,
    processes: int = 1,
    beam: Sequence[str] | None = None,
) -> Summary:
    """Write a data set into `data_dir`, unless it is there already; what an interrupted preparation finished is kept.

    Args:
      source: what to prepare.
      data_dir: the folder of prepared data sets, perhaps on gs:// (see `prepare_remote`).
      max_skipped: how many problems to put up with, as a share of the records.
      processes: how many write shards at the same time. With more than one, a script that calls this needs the usual
        `if __name__ == "__main__":`.
      beam: options of Apache Beam, whose workers then write the shards instead (see `beam.run`).

    Returns:
      What was kept and what was skipped.

    Raises:
      UserError: there are more problems than `max_skipped` allows, or ids that occur twice; a data set of this name was
        prepared from something else, or is just being prepared; a file could not be read or written.
    """
    files.check_utf8(data_dir)
    if files.is_remote(data_dir) and beam is None:
        return prepare_remote(
            source,
            data_dir,
            lambda folder: prepare(source, folder, max_skipped=max_skipped, processes=processes),
        )
    if files.is_remote(data_dir):
        writer: Writer = on_beam.RemoteWriter(source, data_dir)
    elif beam is None:
        writer = Writer(source, data_dir)
    else:  # workers start in other folders
        writer = Writer(source, str(Path(data_dir).expanduser().absolute()))
    try:
        if done := find_prepared(source.name, data_dir, source.origin, source.found, source.renewed):
            return done
        with writer.locked():
            if done := find_prepared(source.name, data_dir, source.origin, source.found, source.renewed):
                return done  # by another process, just now
            writer.begin(alone=True)
            writer.clear(range(len(source.parts)))
            shards = _write_shards(writer, processes, beam, max_skipped)
            return finish(writer, shards, max_skipped)
    except OSError as error:
        raise UserError(f"{source.name} could not be prepared in {data_dir}: {error}") from error


def prepare_remote(source: Source, data_dir: str, work: Callable[[str], Any]) -> Summary:
    """Have a data set prepared in a folder of the cache, on this machine's disk, and copy it to a remote `data_dir`.

    Args:
      source: what is prepared.
      data_dir: such as "gs://bucket/data".
      work: prepares it in the folder that it is given, and goes on with what lies there.

    Returns:
      What was kept and skipped.

    Raises:
      UserError: see `prepare`.
    """
    place, folder = _cache_of(data_dir), Path(source.name) / VERSION
    try:
        if done := find_prepared(source.name, data_dir, source.origin, source.found, source.renewed):
            return done
        with Writer(source, str(place)).locked("upload"):
            work(str(place))
            upload(place / folder, tfds.core.Path(data_dir) / folder)
            copied = (place / folder).with_name(f"{VERSION}.copied")  # half of it must not be taken for whole
            shutil.rmtree(copied, ignore_errors=True)
            (place / folder).rename(copied)
            shutil.rmtree(copied)
    except OSError as error:
        raise UserError(f"{source.name} could not be prepared in {data_dir}: {error}") from error
    return _summary(schema.read_builder(tfds.core.Path(data_dir) / folder))


def _cache_of(data_dir: str) -> Path:
    return files.home() / "prepared" / hashlib.sha256(data_dir.encode()).hexdigest()[:16]


def _forget_copy(name: str, data_dir: str) -> None:
    """Remove what a kill left in the cache of a data set that was copied, unless another process is copying it."""
    folder = _cache_of(data_dir) / name / VERSION
    if folder.exists():
        lock = files.locked(folder.with_name(f"{VERSION}upload.lock"), wait=False)
        with contextlib.suppress(BlockingIOError), lock:
            shutil.rmtree(folder)


def _write_shards(writer: Writer, processes: int, beam: Sequence[str] | None, max_skipped: float) -> list[Shard]:
    source = writer.source
    shards = {index: shard for index, part in enumerate(source.parts) if (shard := writer.finished(index, part))}
    left = [index for index in range(len(source.parts)) if index not in shards]
    problems = 0
    work = run(writer, left, processes) if beam is None else on_beam.run(writer, left, beam)
    with contextlib.closing(work) as tasks:
        description = f"Preparing the shards of {source.name}"
        for index, shard in track(tasks, description, total=len(source.parts), done=len(shards)):
            shards[index] = shard
            problems += sum(problem.count for problem in shard.problems if problem.reason not in source.expected)
            if source.records is not None and problems > max(1000, max_skipped * source.records):
                break  # it need not write the rest to know that there are too many
    if len(shards) < len(source.parts):
        _check_share(writer, shards, source.records or 0, max_skipped)
    return [shards[index] for index in range(len(source.parts))]


def run(writer: Writer, indices: Sequence[int], processes: int) -> Generator[tuple[int, Shard], None, None]:
    """Write shards, in this process or in several; each is given with its number when it is finished.

    Raises:
      UserError: one of the processes was killed.
    """
    if processes == 1 or len(indices) < 2:
        for index in indices:
            yield index, writer.write(index, writer.source.parts[index])
        return
    others = {*multiprocessing.active_children()}  # of whoever calls this
    # Spawned: a process that is forked from one in which JAX has started may hang.
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(indices)), multiprocessing.get_context("spawn"), _begin_worker, (writer.without_parts(),)
    ) as pool:
        waiting = {pool.submit(_write_shard, index, writer.source.parts[index]): index for index in indices}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "One of the processes that prepare was killed, perhaps for want of memory. The same command goes on "
                "from where they were; `clipcap prepare` with fewer --processes needs less."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


_writer: Writer  # of a worker


def _begin_worker(writer: Writer) -> None:
    global _writer
    _writer = writer
    end_with_parent()


def _write_shard(index: int, part: Part) -> Shard:
    return _writer.write(index, part)


def finish(writer: Writer, shards: list[Shard], max_skipped: float) -> Summary:
    """Put finished shards together; see `prepare`."""
    source = writer.source
    problems = _problems(source, shards)
    kept = sum(shard.images for shard in shards)
    records = source.records or kept + sum(problem.count for problem in problems)
    _check_share(writer, dict(enumerate(shards)), records, max_skipped)
    if not kept:
        writer.discard()
        raise UserError(f"{source.name}: there is nothing to prepare.{_then(problems)}")
    for split in dict.fromkeys(part.split for part in source.parts):
        indices = [index for index, part in enumerate(source.parts) if part.split == split]
        if repeated := _repeated(writer, indices):
            writer.discard()
            raise UserError(
                f"{source.name}: {len(repeated):,} image ids occur more than once in {split}: {', '.join(repeated[:5])}"
            )
    if problems:
        with (writer.unfinished / "problems.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(files.to_json(dataclasses.asdict(problem)) + "\n" for problem in problems)
    captions: Counter[str] = Counter()
    words: Counter[int] = Counter()
    for part, shard in zip(source.parts, shards, strict=True):
        if shard.images:
            captions[part.split] += shard.captions
        words.update(shard.words)
    writer.describe(
        shards,
        {
            **source.metadata,
            "source": dict(source.origin),
            "found": dict(source.found),
            "root": source.root,
            "encoder": source.encoder,
            "captions": dict(captions),
            "words": sorted(words.items()),
            "skipped": _counts(problems),
            "problems": [dataclasses.asdict(problem) for problem in problems[:_STORED_PROBLEMS]],
            "notes": list(source.notes),
        },
    )
    _write_page(writer)
    return _summary(schema.read_builder(writer.publish()))


def _check_share(writer: Writer, shards: Mapping[int, Shard], records: int, max_skipped: float) -> None:
    source = writer.source
    counted = [problem for problem in _problems(source, shards.values()) if problem.reason not in source.expected]
    total = sum(problem.count for problem in counted)
    if total <= max_skipped * records:
        return
    # What is mended shall be read again the next time: all of it where the captions file has to change, or else the
    # shards that have problems.
    if any(problem.reason not in source.expected for problem in source.problems):
        writer.discard()
    for index, shard in shards.items():
        if any(problem.reason not in source.expected for problem in shard.problems):
            writer.forget(index)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in _counts(counted).items())
    raise UserError(
        f"{source.name}: {total:,} problems in {records:,} records, more than --max-skipped={max_skipped:g} allows "
        f"({reasons}). Mend them, or raise --max-skipped (in Python max_skipped) to go on without them."
        f"{_then(counted)}"
    )


def _repeated(writer: Writer, indices: Sequence[int]) -> list[str]:
    """Ids that occur more than once in the shards of a split; hashes first, as there may be millions."""
    hashes = [np.fromiter(map(hash, writer.ids(index)), np.int64) for index in indices]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return []
    found = Counter(image_id for index in indices for image_id in writer.ids(index) if hash(image_id) in suspects)
    return [image_id for image_id, count in found.items() if count > 1]


def find_prepared(
    name: str,
    data_dir: str,
    origin: Mapping[str, Any],
    found: Mapping[str, Any] | None = None,
    renewed: Sequence[str] = (),
) -> Summary | None:
    """The summary of the data set if it is prepared already, None if it is not, or is to be replaced (see `Source`).

    Raises:
      UserError: it was prepared from another origin.
    """
    with files.reached(data_dir):
        folder = tfds.core.Path(data_dir).expanduser() / name / VERSION
        if not schema.is_finished(folder):
            return None
    if not files.is_remote(data_dir):
        for left in Path(folder).parent.glob(f"{VERSION}.*.tmp"):  # replaced by this one
            shutil.rmtree(left, ignore_errors=True)
        sweep(Path(folder))  # in case the process that finished it was killed before it had
    schema.check_metadata(folder)
    builder = schema.read_builder(folder)
    schema.require_metadata(builder)
    stored = builder.info.metadata
    before, now = stored["source"], json.loads(json.dumps(origin))
    if before != now:
        if same_but(renewed, before, now):
            return None
        raise UserError(
            f"{name} was prepared before, but from something else{changes(before, now)}. "
            f"Delete {folder} to prepare it again, or choose another name or --data-dir."
        )
    if files.is_remote(data_dir):
        _forget_copy(name, data_dir)
    summary = _summary(builder)
    images = stored["found"].get("images")
    moved = found is not None and images is not None and images != found.get("images")
    told = [f"its pictures were read from {images}; those that lie elsewhere now were not looked at"] if moved else []
    return dataclasses.replace(summary, notes=(*summary.notes, *told), already_prepared=True)


def _summary(builder: tfds.core.DatasetBuilder) -> Summary:
    stored = builder.info.metadata
    return Summary(
        name=stored["name"],
        folder=str(builder.info.data_dir),
        images={split: builder.info.splits[split].num_examples for split in stored["captions"]},
        captions=dict(stored["captions"]),
        words=dict(map(tuple, stored["words"])),
        skipped=dict(stored["skipped"]),
        problems=tuple(Problem(**problem) for problem in stored["problems"]),
        notes=tuple(stored["notes"]),
        found=stored["found"],
    )


def _write_page(writer: Writer) -> None:
    builder = schema.read_builder(writer.unfinished)
    summary, samples = _summary(builder), {}
    for split, images in summary.images.items():
        opened = schema.Split(summary.name, split, builder)
        opened.shards = [writer.shards / path.name for path in opened.shards]
        samples[split] = [opened[int(i)] for i in np.linspace(0, images - 1, min(images, _SAMPLES))]
    page.write_page(writer.unfinished / "report.html", summary, writer.source.root, samples)


def _problems(source: Source, shards: Iterable[Shard]) -> list[Problem]:
    """All of them, by file and line."""
    problems = [*source.problems, *(problem for shard in shards for problem in shard.problems)]
    return sorted(problems, key=lambda p: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", p.where)])


def _counts(problems: Sequence[Problem]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.reason] += problem.count
    return dict(counts.most_common())


def _then(problems: Sequence[Problem]) -> str:
    return f" The first:\n{first_problems(problems)}" if problems else ""
