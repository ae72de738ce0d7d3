"""Pictures or embeddings become captions."""

__all__ = ["batches", "captioner", "decode", "duplicates", "insight", "settings"]
