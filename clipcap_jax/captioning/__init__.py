"""Pictures or embeddings become captions."""

__all__ = ["captioner", "decode"]
