"""A checkpoint and a split become captions, scores and pages."""

__all__ = ["clipscore", "evaluate", "report"]
