"""HTML pages that need nothing but themselves: pictures inside, and no link to anything outside."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import jinja2

from clipcap_jax import files, pictures
from clipcap_jax.errors import UserError

_LONGEST_SIDE = 320  # of a picture, in pixels
_DRAWING_SIDE = 128  # a picture no larger than this is kept exact and shown with hard pixel edges


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a data URI, or None with `missing` saying why; "" where there was none to show."""

    uri: str | None
    is_drawing: bool
    missing: str


NO_PICTURE = Picture(None, False, "")


def render(template: str, **content: Any) -> str:
    """Fill a template of `templates/`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipcap_jax"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(content)


def write(path: str | Path, template: str, **content: Any) -> None:
    """Fill a template of `templates/` and write it, into a folder that is made.

    Raises:
      OSError: the file cannot be written.
    """
    page = render(template, **content)
    path = files.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode(errors="replace"))  # a file's name may be any bytes


def picture(image: bytes | None, path: str, name: str, digest: str = "") -> Picture:
    """A picture from its bytes or, where these are None, from its file, shrunk; `NO_PICTURE` where there is neither.

    Args:
      image: as encoded.
      path: where it lies; "" where nowhere.
      name: of the picture, for messages.
      digest: see `pictures.read_same`.
    """
    if image is None and not path:
        return NO_PICTURE
    try:
        return Picture(*_data_uri(pictures.read_same(path, digest) if image is None else image), "")
    except FileNotFoundError:
        return Picture(None, False, f"There is no picture at {path}")
    except (OSError, UserError) as error:
        return Picture(None, False, str(error) if path and path in str(error) else f"{path or name}: {error}")


def _data_uri(encoded: bytes) -> tuple[str, bool]:
    """Shrinks a picture and returns it as a data URI, and whether it is a small drawing rather than a photo."""
    image = pictures.decode(encoded)
    is_drawing = max(image.size) <= _DRAWING_SIDE
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    if is_drawing:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80)
    kind = "png" if is_drawing else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_drawing
