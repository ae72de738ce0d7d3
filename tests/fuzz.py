"""Gives readers what chance has made of whole files.

    python tests/fuzz.py png tar --seed 7 --count 10000

Each input has to give a result or a `UserError`, in little memory and time, without anything written or read elsewhere
and without a program or a connection. The first that does not is left in a folder, which is told; what ends the
process, such as a decoder that crashes, leaves it there too.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

# Before anything is imported that reads them. Pictures are small here, so that these bounds are soon reached.
os.environ |= {"CLIPCAP_MAX_PIXELS": "1000000", "CLIPCAP_MAX_BYTES": "10000000", "JAX_PLATFORMS": "cpu"}

from fuzz_seeds import SEEDS, Files
from mutations import FORBIDDEN, mutate

from clipcap_jax.errors import UserError

SECONDS = 10  # of the processor, for an input
MEMORY = 300  # MiB above what whole files take, for all inputs of a kind
ASKED_FOR = 8 << 30  # bytes, beyond which no memory is given

_STARTS = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile", "pty.spawn")
_REACHES = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "webbrowser.", "ctypes.dlopen")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what an input must not bring about."""

    def __init__(self) -> None:
        self.output: Path | None = None  # where files may be written, while it watches
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # of which none can be taken away: there is one watch, see below

    @contextlib.contextmanager
    def over(self, output: Path) -> Iterator[None]:
        self.output, self.seen = output, []
        try:
            yield
        finally:
            self.output = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.output is None:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.fsdecode(args[0])
            wrong = path.endswith(tuple(FORBIDDEN)) or (args[2] & _WRITES and not self._may_write(path))
        elif event.startswith(_CHANGES):
            wrong = not all(self._may_write(arg) for arg in args[:2] if isinstance(arg, str | bytes))
        else:
            wrong = event.startswith((*_STARTS, *_REACHES)) or (event, args[:1]) == ("import", ("antigravity",))
        if wrong:
            self.seen.append(f"{event} {args!r:.300}")
            raise PermissionError(f"fuzzing: {event}")

    def _may_write(self, path: str | bytes) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or Path(real).is_relative_to(self.output or "")


watch = Watch()


def _picture(folder: Path, _: Path) -> None:
    from clipcap_jax import pictures

    (path,) = folder.iterdir()
    data = pictures.read(path)
    pictures.may_be_picture(data[: pictures.START])
    assert pictures.preprocess(pictures.decode(data), 32).shape == (32, 32, 3)


def _read_parts(source: Any) -> None:
    """What preparing reads, up to what it hands over to be written."""
    from clipcap_jax.datasets import schema
    from clipcap_jax.datasets.source import Problem

    problems = list(source.problems)
    for part in source.parts:
        for example in part.read():
            if isinstance(example, Problem):
                problems.append(example)
            else:
                json.dumps(str(schema.to_fields(example, part.split)), ensure_ascii=False).encode()
    "\n".join([*map(str, problems), *source.notes]).encode()


def _records(folder: Path, output: Path) -> None:
    from clipcap_jax.datasets import records

    (captions,) = folder.glob("captions.*")
    embeddings = folder / "embeddings.npy"
    made: list[Any] = []
    with mock.patch("clipcap_jax.datasets.prepare.prepare", lambda source, *_, **__: made.append(source)):
        records.prepare_records(
            records.RecordsSource(
                "mine", str(captions), str(folder / "pictures"), str(embeddings) if embeddings.exists() else None
            ),
            str(output),
        )
    _read_parts(made[0])


def _coco(folder: Path, _: Path) -> None:
    from clipcap_jax.datasets.coco import coco_source

    _read_parts(coco_source(folder))


def _flickr(folder: Path, _: Path) -> None:
    from clipcap_jax.datasets.flickr import flickr_source

    _read_parts(flickr_source("flickr8k", folder))


def _nocaps(folder: Path, _: Path) -> None:
    from clipcap_jax.datasets.nocaps import nocaps_source

    _read_parts(nocaps_source(folder))


def _tar(folder: Path, _: Path) -> None:
    from clipcap_jax.datasets.conceptual import conceptual_source
    from clipcap_jax.inputs import addresses
    from clipcap_jax.inputs.folders import find_pictures

    with contextlib.suppress(UserError):
        for picture in find_pictures([str(folder / "00000.tar")]).paths:
            addresses.read(picture)
    _read_parts(conceptual_source("cc12m", folder))


def _unpack(folder: Path, output: Path) -> None:
    from clipcap_jax.datasets.downloads import unpack

    unpack(folder / "pictures.zip", output)


def _pkl(folder: Path, output: Path) -> None:
    from clipcap_jax.convert.embeddings import convert_pickle

    convert_pickle(folder / "oscar.pkl", output / "clip.npy", output / "captions.jsonl")


def _weights(folder: Path, _: Path) -> None:
    from clipcap_jax.convert import weights

    index = folder / "model.safetensors.index.json"
    weights.read(index if index.exists() else next(folder.glob("model.*")))


def _tokenizer(folder: Path, _: Path) -> None:
    from clipcap_jax.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(str(folder))
    tokenizer = Tokenizer.from_dict(tokenizer.to_dict())
    (ids,) = tokenizer.encode(["A dog, läuft \U0001f415"])
    assert all(0 <= token < tokenizer.size for token in ids)
    tokenizer.decode([*ids, tokenizer.end_id])
    tokenizer.stop_id(".")


def _clip_tokenizer(folder: Path, _: Path) -> None:
    from clipcap_jax.text.clip_tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer.load(str(folder))
    (ids,) = tokenizer.encode(["A dog, läuft \U0001f415"], 77)
    assert all(0 <= token < tokenizer.size for token in ids)


READERS: dict[str, Callable[[Path, Path], None]] = {
    **dict.fromkeys(("jpeg", "png", "webp", "avif", "gif", "bmp", "tiff", "ppm", "jpeg2000"), _picture),
    **dict.fromkeys(("jsonl", "json", "csv", "tsv", "txt", "npy"), _records),
    **dict.fromkeys(("karpathy", "coco"), _coco),
    "flickr8k": _flickr,
    "nocaps": _nocaps,
    "tar": _tar,
    "zip": _unpack,
    "pkl": _pkl,
    **dict.fromkeys(("pt", "safetensors"), _weights),
    "tokenizer": _tokenizer,
    "clip_tokenizer": _clip_tokenizer,
}


def _write(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _peak() -> float:
    """MiB. Not `ru_maxrss`, which begins with what the process had that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _fault(error: BaseException | None, above: float) -> str:
    """What is wrong with how an input ended; "" if nothing is."""
    if watch.seen:
        return f"it did {', '.join(watch.seen)}"
    if error is not None and not isinstance(error, UserError):
        return "it raised " + "".join(traceback.format_exception(error))
    return f"memory rose by {above:.0f} MiB" if above > MEMORY else ""


def fuzz(kind: str, folder: Path, seed: int, first: int, count: int, seconds: float) -> dict[str, Any]:
    """Figures of `count` inputs from the one with number `first`, or as many as `seconds` are enough for.

    Raises:
      SystemExit: one has a fault; it is in `folder`/input.
    """
    seeds, read = SEEDS[kind](), READERS[kind]
    place, output = folder / "input", folder / "output"
    for files in seeds:
        _write(place, files)
        _write(output, {"captions.txt": b""})
        with contextlib.suppress(UserError):  # as programs are refused, whole or not
            read(place, output)
    base, begun, slowest, ended = _peak(), time.monotonic(), 0.0, {"accepted": 0, "refused": 0}
    for number in range(first, first + count):
        if time.monotonic() - begun > seconds:
            break
        random = Random(f"{seed} {kind} {number}")
        files = dict(random.choice(seeds))
        chosen = next(iter(files)) if random.random() < 0.8 else random.choice([*files])
        files[chosen] = mutate(random, chosen, files[chosen])
        _write(place, files)
        _write(output, {"captions.txt": b""})
        (folder / "number").write_text(f"{kind} {number}")
        error: BaseException | None = None
        before = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process, whatever runs in it
        with watch.over(output):
            try:
                read(place, output)
            except BaseException as raised:  # such as panics of Rust, which are no `Exception`
                error = raised
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - before)
        ended["accepted" if error is None else "refused"] += 1
        if fault := _fault(error, _peak() - base):
            again = f"python {Path(__file__).name} {kind} --seed {seed} --first {number} --count 1"
            sys.exit(f"{kind}: {chosen} in {place}: {fault}\nAgain: {again}")
    return {**ended, "slowest": round(slowest, 2), "memory": round(_peak() - base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=READERS, metavar="kind", help=", ".join(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each kind, at most")
    parser.add_argument("--folder", type=Path, help="for inputs and what is made of them; else a temporary one")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = (flags.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ASKED_FOR,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind in flags.kinds:
        found = fuzz(kind, folder, flags.seed, flags.first, flags.count, flags.seconds)
        print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main()
