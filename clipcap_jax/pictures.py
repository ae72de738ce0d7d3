"""Pictures: from the bytes of a file to the square of pixels that CLIP reads.

`preprocess` gives what OpenAI's CLIP gives (`_transform` in its `clip.py`: torchvision's `Resize` and `CenterCrop`),
bit for bit on RGB and greyscale pictures. Subtracting the mean and dividing by the standard deviation is left to the
model: uint8 is a quarter of the bytes to send to the device.

`decode` follows CLIP's `convert("RGB")`, with three exceptions where that gives a wrong picture:
  - greyscale of more than 8 bits, and of floating-point numbers, is scaled to 8 (`convert` cuts it off at 255, which is
    white nearly everywhere): see `_to_8_bits`;
  - the rotation that a camera noted in EXIF is applied;
  - conversion comes before resizing, not after: the average of two palette indices is no colour.
As there, transparency is dropped: what a transparent pixel shows is the colour stored beneath it.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from clipcap_jax.errors import UserError

# What is opened, whatever its name says. Pillow knows more, among them PostScript, for which it starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

# Of these, whose decoders hold a picture several times in memory, only half as many pixels are read.
_SEVERAL_TIMES = ("WEBP", "AVIF", "JPEG2000")

# Names of pictures, among them such as only their message says what they are.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
    *(
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".jp2",
        ".j2k",
        ".jpx",
        ".jpf",
        ".heic",
        ".heif",
        ".jxl",
    ),
}
START = 32  # bytes by which a picture can be told

# A resized picture's long side grows with this ratio: 1 x 65,535 pixels would become 10 GB.
MAX_ASPECT_RATIO = 100

# Environment variables that raise limits: of a picture, of its file, and of the seconds that a disk takes to give it.
MAX_PIXELS, MAX_BYTES, MAX_SECONDS = "CLIPCAP_MAX_PIXELS", "CLIPCAP_MAX_BYTES", "CLIPCAP_MAX_SECONDS"
_LIMITS = {MAX_PIXELS: Image.MAX_IMAGE_PIXELS or 0, MAX_BYTES: 2**30, MAX_SECONDS: 60}

_STRIP = 1 << 20  # pixels

_LOADING = threading.Lock()  # of what others opened: two threads may be given the same, which reads from one file

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_START_OF_SCAN = 0xDA
# Segments "application" and "comment", but for JFIF's and Adobe's, which say how the colours are stored.
_JPEG_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_TURNS = {  # by the orientation that EXIF notes
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHERS = (  # in lower case, where they stand, and what they mean
    (b"ftypheic", 4, "it is HEIC, as phones save photos: convert it to JPEG"),
    (b"ftypheix", 4, "it is HEIC, as phones save photos: convert it to JPEG"),
    (b"ftypmif1", 4, "it is HEIF, as phones save photos: convert it to JPEG"),
    (b"\xff\x0a", 0, "it is JPEG XL: convert it to JPEG or PNG"),
    (b"\0\0\0\x0cjxl ", 0, "it is JPEG XL: convert it to JPEG or PNG"),
    (b"%!ps", 0, "it is PostScript"),
    (b"\xc5\xd0\xd3\xc6", 0, "it is PostScript"),
    (b"%pdf", 0, "it is a PDF document"),
    (b"8bps", 0, "it is a Photoshop document: save it as PNG"),
    (b"<svg", 0, "it is an SVG drawing: save it as PNG"),
    (b"<?xml", 0, "it is XML, an SVG drawing perhaps: save it as PNG"),
    (b"<!doctype html", 0, "it is a web page"),
    (b"<html", 0, "it is a web page"),
    (b"http://", 0, "it is a list of addresses, which `clipcap caption` reads if @ stands before its name"),
    (b"https://", 0, "it is a list of addresses, which `clipcap caption` reads if @ stands before its name"),
    (b"\0\0\0\0", 0, "it begins with zeros: a download or copy that was not finished, perhaps"),
)

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")


def digest(encoded: bytes) -> str:
    """What tells a picture from others, as data sets store it: the first half of the SHA-256 of its file."""
    return hashlib.sha256(encoded).hexdigest()[:32]


def may_be_picture(start: bytes) -> bool:
    """Whether a file that begins so may be a picture that `decode` reads, or one that is to be converted first."""
    Image.init()
    accepting = (accept for _, accept in (Image.OPEN[name] for name in FORMATS) if accept)
    return any(accept(start) is True for accept in accepting) or "convert it" in _kind(start)


def limit(name: str) -> int:
    """The limit of this name, which its environment variable may have changed.

    Raises:
      UserError: that holds no number.
    """
    given = os.environ.get(name, str(_LIMITS[name]))
    if not given.isdecimal():
        raise UserError(f"the environment variable {name} has to be a whole number, not {given!r}")
    return int(given)


def read(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
      UserError: it is a folder, a pipe or a device, of which the one may wait for ever and the other not end; or too
        large.
      TimeoutError: the disk or the network that it lies on does not answer.
      OSError: it cannot be read.
    """
    return in_time(lambda: _read(path), "the file system", str(path))


def in_time(read: Callable[[], bytes], whose: str, name: str) -> bytes:
    """What is read from where there may never be an answer.

    Args:
      read: gives it.
      whose: answer it is, for the message.
      name: of what is read, for the message.

    Raises:
      TimeoutError: it takes longer than `limit(MAX_SECONDS)`.
    """
    answer: Future[bytes] = Future()

    def fill() -> None:
        try:
            answer.set_result(read())
        except BaseException as error:
            answer.set_exception(error)

    # A file system whose server is gone answers never, and nothing can interrupt who waits for it. A daemon is left.
    threading.Thread(target=fill, daemon=True).start()
    try:
        return answer.result(limit(MAX_SECONDS))
    except TimeoutError:
        if answer.done():  # it is the one of `read`
            raise
    raise TimeoutError(
        errno.ETIMEDOUT,
        f"{whose} has not answered for {limit(MAX_SECONDS)} seconds (the environment variable {MAX_SECONDS})",
        name,
    )


def _read(path: Path) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a file, but a folder, a pipe or a device")
    if found.st_size > limit(MAX_BYTES):
        raise _too_many_bytes()
    return path.read_bytes()


def read_stream(stream: IO[bytes], size: int = 0) -> bytes:
    """The bytes of a picture that an archive or a server gives out.

    Args:
      stream: of them.
      size: how many there are said to be, if anything is said.

    Raises:
      UserError: it is too large.
    """
    most = limit(MAX_BYTES)
    data = b"" if size > most else stream.read(most + 1)
    if max(size, len(data)) > most:
        raise _too_many_bytes()
    return data


def _too_many_bytes() -> UserError:
    return UserError(
        f"The image is too large: it has more than {limit(MAX_BYTES):,} bytes. A higher limit can be set by the "
        f"environment variable {MAX_BYTES}."
    )


def read_same(path: str, known: str) -> bytes:
    """The bytes of a picture's file, where these are still what they were when a data set was prepared from it.

    Args:
      path: where it lies.
      known: its `digest`; "" where that is not known.

    Raises:
      UserError: they are not; or see `read`.
      OSError: the file cannot be read.
    """
    encoded = read(Path(path))
    if known and digest(encoded) != known:
        raise UserError(f"{path} is another picture than it was when the data set was prepared")
    return encoded


def decode(data: bytes) -> Image.Image:
    """Decodes the bytes of an image file, in any of `FORMATS`. Of what it says besides pixels only the orientation is
    read; what cannot be read of that is as if it were not there.

    Args:
      data: GIFs and other animations give their first frame.

    Returns:
      The whole picture in mode "RGB", upright.

    Raises:
      UserError: it is not such an image, is truncated or broken, has more pixels than `limit(MAX_PIXELS)` (half as many
        in WebP, AVIF and JPEG 2000) or no defined range of brightness, or is more than `MAX_ASPECT_RATIO` times as long
        as wide.
    """
    if not data:
        raise UserError("The image is empty: 0 bytes.")
    try:
        image = _load(data)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        try:
            image = _load(_without_metadata(data))
        except Exception:
            if isinstance(error, UnidentifiedImageError):
                raise UserError(f"Not an image that can be read here: {_kind(data)}.") from None
            raise UserError(f"The image is truncated or broken: {error}.") from error
    image = _to_8_bits(image)  # named so, the wider one is given up before the next step
    return _to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """As `decode`, of a picture that Pillow has opened or made, in any mode; it stays as it is.

    Raises:
      UserError: as of `decode`; or Pillow cannot read its pixels.
    """
    try:
        with _LOADING:
            image = _upright(image)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"The image is truncated or broken: {error}.") from error
    image = _to_8_bits(image)
    return _to_rgb(image if image.mode == "RGB" else image.copy())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # `convert` would copy it
    image.info.pop("transparency", None)  # it would be dropped anyway, with a warning
    return image.convert("RGB")


def _load(data: bytes) -> Image.Image:
    most = limit(MAX_PIXELS)
    if Image.MAX_IMAGE_PIXELS:  # Pillow's own, of which it refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(most) from None
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Within the limits, its pixels read."""
    most = limit(MAX_PIXELS)
    if image.format in _SEVERAL_TIMES:
        most //= 2
    # A TIFF's tiles are read as a whole, and may be larger than the picture that is cut out of them.
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0)
    if max(image.width * image.height, tile) > most:
        raise _too_many_pixels(most)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UserError(f"The image is too thin: {image.width} x {image.height} pixels.")
    image.load()
    with contextlib.suppress(Exception):  # whatever is wrong with its metadata
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
    return image


def _too_many_pixels(most: int) -> UserError:
    return UserError(
        f"The image is too large: it has more than {most:,} pixels. A higher limit can be set by the environment "
        f"variable {MAX_PIXELS}."
    )


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG without what decoding does not need; another file as it is."""
    if data.startswith(_PNG):
        return _PNG + b"".join(part for name, part in _png_chunks(data) if name[:1].isupper() or name == b"tRNS")
    if data.startswith(_JPEG):
        return _JPEG + b"".join(part for marker, part in _jpeg_segments(data) if marker not in _JPEG_METADATA)
    return data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names, which begin with a capital where decoding needs the chunk, and the chunks."""
    position = len(_PNG)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], data[position:end]
        position = end


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and segments up to the pixels, which are the last with all that follows."""
    position = len(_JPEG)
    while data[position : position + 1] == b"\xff" and data[position + 1] != _START_OF_SCAN:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position + 1], data[position:end]
        position = end
    yield _START_OF_SCAN, data[position:]


def _kind(data: bytes) -> str:
    """What bytes that are no picture are, by how they begin."""
    for start, offset, kind in _OTHERS:
        if data[offset : offset + len(start)].lower() == start:
            return kind
    return f"it starts with {data[:12]!r}"


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits, by what its numbers are: the range of whole ones is the least of 8, 12 and 16 bits
    that holds them, whatever they are stored in; that of others is 0 to 1, or 0 to 255 if one is above 1."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    ranges = np.array([(strip.min(), strip.max()) for strip in _strips(image)])
    low, high = ranges[:, 0].min(), ranges[:, 1].max()
    if image.mode == "F":
        if not (low >= 0 and high <= 0xFF):  # or not a number
            raise UserError(
                f"The image has floating-point pixels from {low:g} to {high:g}, whose brightness is not defined. "
                "Save it with 8 or 16 bits, or with numbers from 0 to 1."
            )
        scale = 255 if high <= 1 else 1
        return Image.fromarray(np.concatenate([(strip * scale).round().astype(np.uint8) for strip in _strips(image)]))
    bits = next((bits for bits in (8, 12, 16) if high < 1 << bits), None)
    if bits is None or low < 0:
        raise UserError("The image has negative pixels, or of more than 16 bits. Save it with 8 or 16 bits.")
    return Image.fromarray(np.concatenate([(strip >> (bits - 8)).astype(np.uint8) for strip in _strips(image)]))


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
    """Its pixels, some rows at a time: of the whole, NumPy would hold several copies."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def preprocess(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side to `size` pixels (bicubic) and cuts out the square in the middle, as CLIP does.

    Args:
      image: in mode "RGB".
      size: pixels of the square's side: 224 for ViT-B/32.

    Returns:
      uint8, shape (size, size, 3).
    """
    short, long = sorted(image.size)
    # int, not round: as torchvision's Resize computes it.
    resized_long = int(size * long / short)
    width, height = (size, resized_long) if image.width <= image.height else (resized_long, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)  # round half to even, as torchvision's CenterCrop
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def load_ahead(
    load: Callable[[_Item], _Loaded], items: Iterable[_Item], *, workers: int, ahead: int
) -> Generator[_Loaded]:
    """`load(item)` of each item, in order, by threads that are up to `ahead` items ahead of whoever takes them.

    Without `workers`, each is loaded when it is asked for. The threads end with the last item, or when it is closed.
    """
    if not workers:
        yield from map(load, items)
        return
    waiting: deque[Future[_Loaded]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
