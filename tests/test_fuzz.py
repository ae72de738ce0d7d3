"""Readers get what fuzz.py makes of whole files: a few inputs of each kind or, with `-m slow`, ten thousand."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fuzz_seeds import SEEDS

FUZZ = Path(__file__).with_name("fuzz.py")
SEED = 0
PICTURES = ("jpeg", "png", "webp", "avif", "gif", "bmp", "tiff", "ppm", "jpeg2000")
CAPTIONS = ("jsonl", "json", "csv", "tsv", "txt", "npy")
ARCHIVES = ("karpathy", "coco", "flickr8k", "nocaps", "tar", "zip")
WEIGHTS = ("pkl", "safetensors", "pt")
TOKENIZERS = ("tokenizer", "clip_tokenizer")


def run(command: Sequence[str | Path], timeout: float) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, *command]
    return subprocess.run(done, cwd=FUZZ.parent, capture_output=True, text=True, errors="replace", timeout=timeout)


def fuzz(kinds: Sequence[str], count: int, folder: Path, seconds: float = float("inf")) -> None:
    if "pt" in kinds:
        pytest.importorskip("torch", reason="needs the torch extra")
    options: list[str | Path] = [
        "--seed",
        str(SEED),
        "--count",
        str(count),
        "--seconds",
        str(seconds),
        "--folder",
        folder,
    ]
    done = run([FUZZ, *kinds, *options], timeout=100 + len(kinds) * count)
    if done.returncode:
        number = (folder / "number").read_text() if (folder / "number").exists() else "the whole files"
        pytest.fail(
            f"seed {SEED}, {number}, status {done.returncode} (-27: more time than it is given); the input is in "
            f"{folder / 'input'}\n{done.stderr[-3000:]}"
        )
    assert done.stdout.count('"accepted"') == len(kinds)


@pytest.mark.parametrize("kinds", [PICTURES, CAPTIONS, ARCHIVES, WEIGHTS, TOKENIZERS], ids=lambda kinds: kinds[0])
def test_each_input_gives_a_result_or_a_user_error(kinds: Sequence[str], tmp_path: Path) -> None:
    fuzz(kinds, 200, tmp_path, seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS)
def test_ten_thousand_inputs(kind: str, tmp_path: Path) -> None:
    fuzz([kind], 10_000, tmp_path)


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("open(folder / 'elsewhere', 'w')", "it did open"),
        ("open('/etc/passwd')", "it did open"),
        ("os.mkdir(folder / 'elsewhere')", "it did os.mkdir"),
        ("os.system('true')", "it did os.system"),
        ("__import__('subprocess').run(['true'])", "it did subprocess.Popen"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "it did socket.getaddrinfo"),
        ("__import__('antigravity')", "it did import"),
        ("b'a' * (400 << 20)", "memory rose by"),
        ("[][1]", "it raised Traceback"),
        ("[iter(int, 1) for _ in iter(int, 1)]", -27),
        ("os.kill(os.getpid(), 11)", -11),
    ],
)
def test_what_must_not_happen_is_noticed(deed: str, told: str | int, tmp_path: Path) -> None:
    """Reading does something that it must not; what swallows all errors does not hide it."""
    program = f"""
import os, sys, fuzz
def read(folder, output):
    if fuzz.watch.output:
        try:
            {deed}
        except PermissionError:
            pass
fuzz.READERS["zip"], fuzz.SECONDS = read, 1
sys.argv = ["fuzz.py", "zip", "--count", "1", "--folder", {str(tmp_path)!r}]
fuzz.main()
"""
    done = run(["-c", program], timeout=100)
    assert done.returncode == (told if isinstance(told, int) else 1), done.stderr
    if isinstance(told, str):
        assert told in done.stderr
        assert "Again: python fuzz.py zip --seed 0 --first 0 --count 1" in done.stderr
    assert (tmp_path / "number").read_text() == "zip 0"
    assert (tmp_path / "input" / "pictures.zip").is_file()


def test_every_kind_is_fuzzed() -> None:
    assert sorted(SEEDS) == sorted([*PICTURES, *CAPTIONS, *ARCHIVES, *WEIGHTS, *TOKENIZERS])
