"""Orbax checkpoints of runs."""

__all__ = ["store"]
