"""Others' weights and embeddings, in and out."""

__all__ = ["assemble", "clip", "clip_text", "embeddings", "gpt2", "original", "package"]
