"""What img2dataset leaves of a list of links: shards of samples, each a tar ("webdataset") or a folder ("files").

https://github.com/rom1504/img2dataset: the files of a sample share a name, such as 000000012.jpg, .txt and .json, and
beside each shard 00000 lies 00000_stats.json.
"""

import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from clipcap_jax import pictures
from clipcap_jax.datasets.source import Problem
from clipcap_jax.errors import UserError

_PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclasses.dataclass
class Sample:
    """A picture and its caption, or what there is of them.

    Attributes:
      where: its place, for messages.
      key: names it among all samples.
      image: the file's bytes; None where there is none.
      image_path: where that lies; empty in a tar.
      caption: None where there is none.
      url: what the picture was behind; empty where that is not known.
      fault: why it is none, as the downloader noted it.
      missing: the reason to give where there is no picture.
    """

    where: str
    key: str
    image: bytes | None = None
    image_path: str = ""
    caption: str | None = None
    url: str = ""
    fault: str = ""
    missing: str = "image missing"


def read(path: Path) -> Iterator[Sample | Problem]:
    """The samples of a shard, a tar or a folder, and what of it is broken or lost.

    Raises:
      OSError: the disk or the network failed, so that another time it may be there.
    """
    return _read_folder(path) if path.is_dir() else _read_tar(path)


def where(path: Path) -> str:
    """Train and validation have shards of the same names."""
    return f"{path.parent.name}/{path.name}"


def stats(path: Path) -> dict[str, int]:
    """The counts that img2dataset writes beside a shard, none where there is no such file."""
    try:
        content = json.loads(path.with_name(f"{path.stem}_stats.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    counts = ("count", "successes", "failed_to_download", "failed_to_resize")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), int) for key in counts):
        return {}
    return {key: content[key] for key in counts}


def _read_tar(path: Path) -> Iterator[Sample | Problem]:
    """Files of one sample follow each other, as webdataset wants it; not more than one sample is held."""
    count = 0
    fault = ""
    try:
        with tarfile.open(path, "r:") as tar:
            sample: Sample | None = None
            group = ""
            for member in tar:
                place, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if not member.isfile() or not key:
                    continue
                if sample is None or group != f"{place}/{key}":
                    if sample is not None:
                        count += 1
                        yield sample
                    group = f"{place}/{key}"
                    sample = Sample(f"{where(path)}: {key}", _image_id(path, key))
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                try:
                    _add(sample, suffix, pictures.read_stream(file, member.size))
                except UserError as error:
                    sample.fault = f"its .{suffix} cannot be read: {error}"
            end = tar.offset
            if sample is not None:
                count += 1
                yield sample
        with path.open("rb") as raw:
            raw.seek(end)
            if raw.read(512) != bytes(512):
                fault = "it ends without the mark of its end"
    except OSError:
        raise
    except Exception as error:  # on a damaged tar tarfile raises nearly anything
        fault = str(error)
    lost = stats(path).get("successes", 0) - count
    if fault or lost > 0:
        fault = fault or f"it holds {count:,} samples"
        detail = f"{path}: {fault}; {lost:,} samples lost" if lost > 0 else f"{path}: {fault}"
        yield Problem(where(path), "broken tar", detail, max(lost, 1))


def _read_folder(path: Path) -> Iterator[Sample | Problem]:
    keys = sorted({name.partition(".")[0] for name in os.listdir(path)} - {""})
    for key in keys:
        sample = Sample(f"{where(path)}/{key}", _image_id(path, key))
        for suffix in ("json", "txt", *_PICTURES):
            file = path / f"{key}.{suffix}"
            if file.is_file():
                _add(sample, suffix, file.read_bytes())
                if sample.image is not None and not sample.image_path:
                    sample.image_path = str(file)
        yield sample
    if (lost := stats(path).get("successes", 0) - len(keys)) > 0:
        yield Problem(
            where(path), "samples missing", f"{path} holds {len(keys):,}, {lost:,} fewer than were made", lost
        )


def _image_id(path: Path, key: str) -> str:
    """img2dataset's keys start with the name of the shard; others are made to."""
    return key if key.startswith(path.stem) else f"{path.stem}/{key}"


def _add(sample: Sample, suffix: str, data: bytes) -> None:
    """Adds one of the files of a sample."""
    suffix = suffix.lower()
    try:
        if suffix == "txt":
            sample.caption = data.decode("utf-8-sig")
        elif suffix == "json":
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("no object {...}")
            sample.url = str(fields.get("url") or "")
            sample.url.encode()  # JSON can spell half a character
            if fields.get("status", "success") != "success":
                sample.fault = f"{fields['status']}: {fields.get('error_message')}"
        elif suffix in _PICTURES:
            if sample.image is not None:
                sample.fault = "it has two pictures"
            sample.image = data
    except (ValueError, RecursionError) as error:
        sample.url = ""
        sample.fault = f"its .{suffix} cannot be read: {error}"
