"""Orbax checkpoints of runs."""

__all__ = ["metadata", "store"]
