"""Pictures: from the bytes of a file to the square of pixels that CLIP reads.

`preprocess` gives what OpenAI's CLIP gives (`_transform` in its `clip.py`: torchvision's `Resize` and `CenterCrop`),
bit for bit on RGB and greyscale pictures. Subtracting the mean and dividing by the standard deviation is left to the
model: uint8 is a quarter of the bytes to send to the device.

`decode` follows CLIP's `convert("RGB")`, with three exceptions where that gives a wrong picture:
  - 16-bit greyscale is scaled to 8 bits (`convert` cuts it off at 255, which is white nearly everywhere);
  - the rotation that a camera noted in EXIF is applied;
  - conversion comes before resizing, not after: the average of two palette indices is no colour.
As there, transparency is dropped: what a transparent pixel shows is the colour stored beneath it.
"""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipcap_jax.errors import UserError

# A resized picture's long side grows with this ratio: 1 x 65,535 pixels would become 10 GB.
MAX_ASPECT_RATIO = 100

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")


def digest(encoded: bytes) -> str:
    """What tells a picture from others, as data sets store it: the first half of the SHA-256 of its file."""
    return hashlib.sha256(encoded).hexdigest()[:32]


def read_same(path: str, known: str) -> bytes:
    """The bytes of a picture's file, where these are still what they were when a data set was prepared from it.

    Args:
      path: where it lies.
      known: its `digest`; "" where that is not known.

    Raises:
      UserError: they are not.
      OSError: the file cannot be read.
    """
    encoded = Path(path).read_bytes()
    if known and digest(encoded) != known:
        raise UserError(f"{path} is another picture than it was when the data set was prepared")
    return encoded


def decode(data: bytes) -> Image.Image:
    """Decodes the bytes of an image file, in any format that Pillow reads.

    Args:
      data: JPEG, PNG, WebP, GIF (its first frame), TIFF, ...

    Returns:
      The whole picture in mode "RGB", upright.

    Raises:
      UserError: it is not an image, is truncated or broken, has more than `2 * PIL.Image.MAX_IMAGE_PIXELS` pixels,
        has no defined range of brightness, or is more than `MAX_ASPECT_RATIO` times as long as wide.
    """
    if not data:
        raise UserError("The image is empty: 0 bytes.")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise UserError(f"The image is too large. {error} Raise PIL.Image.MAX_IMAGE_PIXELS to read it.") from None
    except UnidentifiedImageError:
        raise UserError(f"Not an image that Pillow can read: it starts with {data[:12]!r}.") from None
    except MemoryError:
        raise
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"The image is truncated or broken: {error}.") from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UserError(f"The image is too thin: {image.width} x {image.height} pixels.")
    if image.mode == "F":
        raise UserError("The image has floating-point pixels, whose range is not defined. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    image.info.pop("transparency", None)  # it would be dropped anyway, with a warning
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise UserError("The image has more than 16 bits per pixel. Save it with 8 or 16 bits.")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


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
