"""The `clipcap` command, one file for each group of verbs: arguments in, one library call."""

__all__ = ["caption", "cli", "convert", "data", "demo", "doctor", "evaluate", "info", "score", "train"]
