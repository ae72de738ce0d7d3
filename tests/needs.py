"""What some tests need and not every machine has: they are skipped without it.

A machine that is meant to have it says so, by name, in the environment variable `CLIPCAP_EXPECT` ("java torch"): there
nothing is tested unless all of it is there, so that no test can leave silently.
"""

import importlib.util
import os
import shutil

import pytest

# Modules of Python, and programs -> what gives them
HOW = {
    "apache_beam": "the extra beam",
    "axe_playwright_python": "pip install axe-playwright-python",
    "chromium": "Chromium on the PATH",
    "gcp_storage_emulator": "pip install gcp-storage-emulator",
    "gcsfs": "the extra gcs",
    "gradio": "the extra demo",
    "java": "a Java runtime on the PATH",
    "libtpu": "the extra tpu",
    "open_clip": "pip install --no-deps open_clip_torch==3.3.0",
    "playwright": "pip install playwright",
    "pycocoevalcap": "the extra java",
    "tensorflow": "the extra tensorflow",
    "torch": "the extra torch",
    "wandb": "the extra wandb",
}
_PROGRAMS = ("chromium", "java")


def lacks(name: str) -> bool:
    """Whether one of `HOW` is not there."""
    assert name in HOW
    return (shutil.which(name) if name in _PROGRAMS else importlib.util.find_spec(name)) is None


def skip_without(*names: str) -> None:
    """Skip the test, or the module that is being imported, where one of `HOW` is not there."""
    for name in names:
        if lacks(name):
            pytest.skip(f"needs {name}: {HOW[name]}", allow_module_level=True)


def check_expected() -> None:
    """Raises `pytest.UsageError` where something that `CLIPCAP_EXPECT` names is not there, or is no name of `HOW`."""
    for name in os.environ.get("CLIPCAP_EXPECT", "").split():
        if name not in HOW:
            raise pytest.UsageError(f"CLIPCAP_EXPECT names {name!r}, which is none of {', '.join(HOW)}")
        if lacks(name):
            raise pytest.UsageError(f"CLIPCAP_EXPECT names {name}, which is not there: it takes {HOW[name]}")
