"""Writing shards on many machines: the workers of Apache Beam, the engine of TFDS itself, write them.

A worker is given the number of a shard and finds what it shall hold in a file: all the parts of a large data set would
not fit into a pipeline, and no worker needs them all. A shard is written as on one machine and counts once its note is
there, so it does not matter which worker writes it, or how often.
"""

import copy
import hashlib
import importlib.util
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import tensorflow_datasets as tfds

from clipcap_jax import files
from clipcap_jax.datasets.processes import end_with_parent
from clipcap_jax.datasets.shards import VERSION, Shard, Writer, upload
from clipcap_jax.datasets.source import Part, Source
from clipcap_jax.errors import UserError

_POLL = 0.5  # seconds
# What a worker has written may be seen here only later: by default NFS asks once a minute at least.
_PATIENCE = 60.0


def run(writer: Writer, indices: Sequence[int], options: Sequence[str]) -> Generator[tuple[int, Shard], None, None]:
    """As `prepare.run`, by Beam.

    Args:
      writer: of a folder that all workers see, or a `RemoteWriter`.
      indices: the shards to write.
      options: Beam's own, such as "--runner=FlinkRunner".

    Raises:
      UserError: Beam is not installed, or its job failed.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError('--beam needs Apache Beam: pip install "clipcap_jax[beam]"')
    left = list(indices)
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # In a process of its own, as Beam's local runner cannot be stopped otherwise.
    job = context.Process(target=_job, args=(writer.without_parts(), left.copy(), options, sender), daemon=True)
    try:
        for index in left:
            writer.part_file(index).write_bytes(pickle.dumps(writer.source.parts[index]))
        job.start()
        sender.close()
        ended, end = None, ""
        while left:
            if ended is None and connection.wait([job.sentinel], _POLL):
                ended = time.monotonic()
                end = _last_words(receiver, job)
            elif ended is not None:
                time.sleep(_POLL)
            for index in left.copy():  # after the look at the job
                if shard := writer.finished(index, writer.source.parts[index]):
                    left.remove(index)
                    yield index, shard
            if ended is not None and left and (end != "DONE" or time.monotonic() > ended + _PATIENCE):
                raise UserError(_failure(writer, len(left), end))
        job.join()
    finally:
        # A worker that finds no part does nothing: so a job ends that is left to itself on other machines.
        for index in indices:
            writer.part_file(index).unlink(missing_ok=True)
        if job.pid is not None:
            job.terminate()
            job.join()


def _job(writer: Writer, indices: Sequence[int], options: Sequence[str], sender: connection.Connection) -> None:
    """Run the pipeline, and send how it ended."""
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    end_with_parent()

    def lost(error: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(error)
        if error.thread is not None and error.thread.name == "run_worker":
            # It has seen a local worker die, but the local runner goes on to wait for what that was to write.
            sender.send(str(error.exc_value))
            os._exit(1)

    threading.excepthook = lost
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(list(options)))
        _ = (
            pipeline
            | "Shards" >> apache_beam.Create(indices)
            | "Spread" >> apache_beam.Reshuffle()  # or one worker would get them all
            | "Write" >> apache_beam.Map(_write_in_worker, writer)
        )
        end = str(pipeline.run().wait_until_finish())
    except Exception as error:  # a traceback of the worker's; Beam has told it all
        end = str(error).strip().rpartition("\n")[2] or repr(error)
    sender.send(end)


def _write_in_worker(index: int, writer: Writer) -> None:
    """In a worker: write a shard, unless it is there already or no longer wanted."""
    try:
        part = pickle.loads(writer.part_file(index).read_bytes())
    except FileNotFoundError:
        return
    if not writer.finished(index, part):
        writer.write(index, part)


def _last_words(receiver: connection.Connection, job: BaseProcess) -> str:
    try:
        return str(receiver.recv())
    except EOFError:
        job.join()
        return f"its process ended with code {job.exitcode}"


def _failure(writer: Writer, left: int, end: str) -> str:
    if end == "DONE":
        return f"Beam's job is done, but {left:,} shards are not in {writer.shards}: do all workers see this folder?"
    return (
        f"Beam's job failed, {left:,} shards are not written: {end.rstrip('.')}. The same command goes on from where "
        "it was; what Beam tells above may say more."
    )


class RemoteWriter(Writer):
    """A `Writer` to gs://, where there is no disk that all workers see.

    A worker writes a shard to its own disk and copies it to its place, then its note to a folder beside that one, named
    by what is prepared. The metadata are made on the disk of this machine and copied last.
    """

    def __init__(self, source: Source, data_dir: str) -> None:
        place = files.home() / "beam" / hashlib.sha256(data_dir.encode()).hexdigest()[:16]
        super().__init__(source, str(place))
        self.shards = tfds.core.Path(data_dir) / source.name / VERSION
        self.notes = self.shards.with_name(f"{VERSION}.unfinished-{self._digest[:16]}")

    def begin(self, *, alone: bool) -> None:
        """As of a `Writer`. Shards of something else that lie there are written over."""
        super().discard()
        self.unfinished.mkdir(parents=True)
        for folder in (self.shards, self.notes):
            folder.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """As of a `Writer`."""
        super().discard()
        if self.notes.exists():
            self.notes.rmtree()

    def write(self, index: int, part: Part) -> Shard:
        """As of a `Writer`."""
        with tempfile.TemporaryDirectory() as folder:
            here = copy.copy(self)
            here.unfinished = Path(folder)
            here.shards = here.notes = tfds.core.Path(folder)
            shard = super(RemoteWriter, here).write(index, part)
            for path, target in ((here.shards / self.names[index], self.shards), (here._note(index), self.notes)):
                path.copy(target / path.name, overwrite=True)
        return shard

    def publish(self) -> tfds.core.Path:
        """Copy the metadata, and return where all lies."""
        upload(self.unfinished, self.shards)
        self.discard()
        return self.shards
