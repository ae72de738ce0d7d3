"""A prepared data set becomes batches on devices."""

__all__ = ["batches", "embed", "folders"]
