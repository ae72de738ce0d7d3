"""The field's scores for captions, equal to pycocoevalcap's to the last digits; Java only for METEOR."""

from clipcap_jax.metrics.references import References, Scores

__all__ = ["References", "Scores"]
