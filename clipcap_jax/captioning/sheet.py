"""Pictures beside their captions, as a notebook shows them."""

import dataclasses
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipcap_jax import pages
from clipcap_jax.errors import UserError

_HEIGHT = 480  # pixels; what is longer is scrolled


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What `Captioner.caption` gives of several pictures, with errors; a notebook shows `page`, which is HTML."""

    captions: list[Any]
    page: str = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        # In a frame, so that the page's style is not the notebook's, nor the other way round.
        page = html.escape(self.page)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'


def make_sheet(names: Sequence[str], read: Sequence[np.ndarray | UserError], found: Sequence[Any]) -> Sheet:
    """Of names, what the model reads of each (uint8 `H W 3`, or an embedding), and its caption or captions."""
    cards = [
        _card(name, given, captions if isinstance(captions, list) else [captions])
        for name, given, captions in zip(names, read, found, strict=True)
    ]
    return Sheet(list(found), pages.render("captions.html", title="Captions", cards=cards))


def _card(name: str, given: np.ndarray | UserError, captions: list[Any]) -> tuple[dict[str, Any], pages.Picture]:
    """As `captions.html` takes it."""
    if isinstance(captions[0], UserError):
        return {"image": name}, pages.Picture(None, False, str(captions[0]))
    found = [{"caption": caption.text, "finished": caption.finished} for caption in captions]
    return {"image": name, "captions": found}, _picture(given)


def _picture(given: Any) -> pages.Picture:
    if given.ndim != 3:
        return pages.picture(None, "", "")
    buffer = io.BytesIO()
    Image.fromarray(given).save(buffer, "PNG")
    return pages.picture(buffer.getvalue(), "", "")
