"""Orbax checkpoints of runs."""

__all__ = ["metadata", "settings", "store"]
