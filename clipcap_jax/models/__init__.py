"""Pure Linen modules, without input or output; they import nothing of the house."""

__all__ = ["clip_resnet", "clip_text", "clip_vit", "clipcap", "gpt2", "mapper", "transformer"]
