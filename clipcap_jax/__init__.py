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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcap_jax.captioning.captioner import Caption, Captioner

__all__ = ["Caption", "Captioner"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Captioner` and `Caption`, when they are asked for: it takes seconds to import what they stand on."""
    if name not in ("Captioner", "Caption"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clipcap_jax.captioning import captioner

    return getattr(captioner, name)
