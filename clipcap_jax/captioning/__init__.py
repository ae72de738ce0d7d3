"""Pictures or embeddings become captions."""

__all__ = ["batches", "captioner", "decode", "insight", "settings"]
