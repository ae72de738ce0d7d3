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

__version__ = "0.1.0"
