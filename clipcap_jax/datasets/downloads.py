"""Downloads of what owners offer to everyone: checked, and resumed where they stopped.

A file bears its name only once its size and SHA-256 are right; until then it is `<name>.part`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from clipcap_jax import files, pictures
from clipcap_jax.datasets import nocaps
from clipcap_jax.datasets.readers import find_file, not_there
from clipcap_jax.datasets.source import Problem
from clipcap_jax.errors import UserError
from clipcap_jax.progress import is_hidden, track

TRIES = 5
PAUSE = 2.0  # seconds before the second try; doubled for each further one
TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 1 << 20
_BROKEN = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
      url: its address; the part after the last slash is its name.
      size: bytes.
      sha256: in hexadecimal.
    """

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(urllib.parse.urlparse(self.url).path).name


# Sizes and checksums from tensorflow_datasets 4.9.10, url_checksums/coco_captions.txt.
KARPATHY = Remote(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    36_745_453,
    "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
)
# By the folder they unpack to: the zip, and how many pictures it holds.
COCO_PICTURES = {
    "train2014": (
        Remote(
            "http://images.cocodataset.org/zips/train2014.zip",
            13_510_573_713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
        82_783,
    ),
    "val2014": (
        Remote(
            "http://images.cocodataset.org/zips/val2014.zip",
            6_645_013_297,
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        ),
        40_504,
    ),
}


def download_karpathy(manual_dir: str | Path, dataset: str, pictures: bool = False) -> None:
    """What `coco.coco_source` and `flickr.flickr_source` read, unless captions and pictures are there already.

    Args:
      manual_dir: the folder to download to.
      dataset: "coco", "flickr8k" or "flickr30k".
      pictures: whether to fetch and unpack COCO's pictures (20 GB, and as much again while the zips are there).

    Raises:
      UserError: see `download` and `unpack`; or another process is downloading to the same folder.
    """
    folder = Path(manual_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        owners = ("captions_train2014.json", "annotations_trainval2014.zip", "Flickr8k.token.txt", "results.csv")
        if not any(find_file(folder, name) for name in (f"dataset_{dataset}.json", *owners)):
            download(KARPATHY, folder)
        for name, (remote, count) in COCO_PICTURES.items():
            if pictures and (not (folder / name).is_dir() or sum(1 for _ in (folder / name).glob("*.jpg")) < count):
                unpack(download(remote, folder), folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with files.locked(folder / ".download.lock", wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another process is downloading to {folder}") from None


def download_nocaps(manual_dir: str | Path, workers: int = 16) -> list[Problem]:
    """The pictures that nocaps' files in `manual_dir` name, several at once, unless they are there already.

    Nobody has published checksums of them, so each must be a picture that can be decoded.

    Returns:
      What could not be fetched.

    Raises:
      UserError: neither file is there; the owners offer them on Google Drive only.
    """
    folder = Path(manual_dir)
    files = {split: file for split, name in nocaps.FILES.items() if (file := find_file(folder, name))}
    if not files:
        raise not_there(folder, "nocaps", nocaps.LISTING)
    jobs = []
    for split, file in files.items():
        target = nocaps.picture_folder(folder, split) or folder / split
        target.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(file.objects(file.json(), "images")):
            jobs.append((f"{file.name}: images[{index}]", image.get("coco_url"), image.get("file_name"), target))
    with _alone(folder), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda job: _download_picture(*job), jobs)
        return [problem for problem in track(done, "Fetching pictures", total=len(jobs)) if problem]


def _download_picture(where: str, url: object, name: object, folder: Path) -> Problem | None:
    if not isinstance(url, str) or not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        return Problem(where, "not fetched", f"no address or no file name: {url!r}, {name!r}")
    target = folder / name
    if target.is_file():
        return None
    part = folder / f"{name}.part"
    for attempt in range(TRIES):
        try:
            with _open(url) as response:
                data = pictures.read_stream(response)
            pictures.decode(data)  # what is cut off cannot be decoded
            part.write_bytes(data)
            os.replace(part, target)
        except (OSError, http.client.HTTPException, UserError, ValueError) as error:
            fault = str(error)
            if _is_final(error):
                break
            time.sleep(PAUSE * 2**attempt * (attempt + 1 < TRIES))
        else:
            return None
    return Problem(where, "not fetched", f"{url}: {fault}")


def download(remote: Remote, folder: str | Path) -> Path:
    """Fetches a file into a folder, unless it is there already; goes on where an earlier call stopped.

    Returns:
      Its path, `<folder>/<name>`.

    Raises:
      UserError: the server has no such file, the connection broke `TRIES` times, what came is not the file that was
        published, or a file of that name but of another size is in the way.
    """
    target = Path(folder) / remote.name
    part = target.with_name(f"{remote.name}.part")
    if target.exists():
        if (size := target.stat().st_size) != remote.size:
            raise UserError(f"{target} has {size:,} bytes, not {remote.size:,}. Delete it to download it again.")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _progress() as progress:
            task = progress.add_task(remote.name, total=remote.size)
            for attempt in range(TRIES):
                fault = ""
                try:
                    for size in _fetch(remote, part):
                        progress.update(task, completed=size)
                except (*_BROKEN, http.client.HTTPException) as error:
                    if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                        part.unlink(missing_ok=True)  # the server's file ends before ours: start again
                    elif _is_final(error):
                        raise UserError(f"{remote.url} cannot be downloaded: {error}.") from None
                    fault = str(error)
                if part.exists() and part.stat().st_size >= remote.size:
                    break
                time.sleep(PAUSE * 2**attempt * (attempt + 1 < TRIES))
            else:
                raise UserError(
                    f"The connection to {remote.url} broke {TRIES} times{fault and f' ({fault})'}. "
                    f"Run the same command again: it goes on where it stopped."
                )
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if (size := part.stat().st_size) != remote.size or digest != remote.sha256:
            part.unlink()
            raise UserError(
                f"{remote.url} is not the file that was published: {size:,} bytes with SHA-256 {digest}, not "
                f"{remote.size:,} with {remote.sha256}. It was deleted; run the same command to try again."
            )
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from None
    return target


def _fetch(remote: Remote, part: Path) -> Iterator[int]:
    """Appends what is missing of a file, as far as the connection bears; gives its size as it grows."""
    size = part.stat().st_size if part.exists() else 0
    if size >= remote.size:
        return
    with _open(remote.url, {"Range": f"bytes={size}-"} if size else {}) as response:
        # A server may ignore the range, or count from elsewhere: then from the start.
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if size and response.status == 206 and not resumed:
            part.unlink()
            raise ConnectionError("the server sent another range than was asked for")
        with part.open("ab" if resumed else "wb") as file:
            size = size if resumed else 0
            # One byte too many tells that it is another file.
            while size <= remote.size and (data := response.read(min(_CHUNK, remote.size + 1 - size))):
                file.write(data)
                size += len(data)
                yield size


def _open(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    if urllib.parse.urlparse(url).scheme not in ("http", "https"):
        raise ValueError(f"not an address of the web: {url}")
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT)


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 416, 429)
    return isinstance(error, ValueError) and not isinstance(error, UserError)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip into a folder; what an earlier call unpacked is not unpacked again.

    Raises:
      UserError: it is broken, or would write outside the folder.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                parts = PurePosixPath(member.filename).parts
                if not parts or parts[0] == "/" or ".." in parts or "\\" in member.filename:
                    raise UserError(
                        f"{archive} would write outside {folder}: {member.filename!r}. Nothing was unpacked."
                    )
            with contextlib.closing(track(members, f"Unpacking {archive.name}", total=len(members))) as shown:
                for member in shown:
                    target = folder / member.filename
                    if target.is_file() and target.stat().st_size == member.file_size:
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part = target.with_name(f"{target.name}.part")
                    with file.open(member) as source, part.open("wb") as sink:
                        shutil.copyfileobj(source, sink, _CHUNK)  # zipfile checks the CRC at the end
                    os.replace(part, target)
    except UserError:
        raise
    except Exception as error:  # on a damaged zip zipfile raises nearly anything
        raise UserError(f"{archive} cannot be unpacked to {folder}: {error}") from None


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        disable=is_hidden(),
    )
