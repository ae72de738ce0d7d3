"""ClipCap image captioning in JAX.

Letters used in the shape comments throughout the package:

    B batch                     V vocabulary
    P prefix length             N layers
    C clip length (the          W beams (hypotheses kept per image)
      transformer mapper's      H attention heads
      tokens made from the      K head width
      embedding)                D language model width
    T caption tokens            E embedding width
    L = P + T                   I image patches
    S cache slots
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcap_jax.captioning.captioner import Caption, Captioner
    from clipcap_jax.datasets import RecordsSource
    from clipcap_jax.jobs import evaluate, prepare, train

__all__ = ["Caption", "Captioner", "RecordsSource", "evaluate", "prepare", "train"]
__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("Caption", "Captioner"), "captioning.captioner"),
    "RecordsSource": "datasets",
    **dict.fromkeys(("evaluate", "prepare", "train"), "jobs"),
}


def __getattr__(name: str) -> Any:
    """What `__all__` lists, when it is asked for: it takes seconds to import what that stands on."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
