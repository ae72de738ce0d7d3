"""The `clipcap` command, one file for each group of verbs: arguments in, one library call."""

__all__ = [
    "caption",
    "card",
    "cli",
    "convert",
    "data",
    "demo",
    "doctor",
    "evaluate",
    "info",
    "prefix",
    "score",
    "share",
    "train",
]
