"""The field's scores for captions, equal to pycocoevalcap's to the last digits; Java only for METEOR and SPICE."""

from clipcap_jax.metrics.references import References, Scores, score_domains, unavailable
from clipcap_jax.metrics.spice import SpiceConfig
from clipcap_jax.metrics.words import Words

__all__ = [
    "References",
    "Scores",
    "SpiceConfig",
    "Words",
    "coco_files",
    "health",
    "measure",
    "paper",
    "score_domains",
    "scorecard",
    "submission",
    "unavailable",
    "words",
]
