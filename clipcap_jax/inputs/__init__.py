"""A prepared data set becomes batches on devices."""

__all__ = ["addresses", "batches", "embed", "folders"]
