"""A page in the browser on which people try captioners on their own pictures."""

__all__ = ["server"]
