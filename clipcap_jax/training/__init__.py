"""What a run is made of, its step and its loop, validation and logs."""

__all__ = ["loop", "loss", "optim", "step", "validation"]
