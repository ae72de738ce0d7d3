"""Tokenizers."""

__all__ = ["clip_tokenizer", "tokenizer"]
