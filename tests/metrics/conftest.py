import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import needs
import pytest


@pytest.fixture(scope="session")
def pycocoevalcap() -> Path:
    """The folder of the reference implementation."""
    needs.skip_without("pycocoevalcap")
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def java(pycocoevalcap: Path) -> str:
    """The Java program, where pycocoevalcap is there for it to run."""
    needs.skip_without("java")
    program = shutil.which("java")
    assert program is not None
    return program


@pytest.fixture
def java_tokenize(java: str, pycocoevalcap: Path, tmp_path: Path) -> Callable[[Sequence[str]], list[str]]:
    """What pycocoevalcap's `PTBTokenizer` does, without writing into its package."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    def tokenize(captions: Sequence[str]) -> list[str]:
        file = tmp_path / "captions.txt"
        file.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
        jar = pycocoevalcap / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        tokenizer = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
        run = subprocess.run(
            [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), *tokenizer], capture_output=True, check=True
        )
        lines = run.stdout.decode().split("\n")
        return [
            " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATIONS)
            for line, _ in zip(lines, captions, strict=False)
        ]

    return tokenize


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a `java` on the PATH that runs a shell script instead; `java -version` prints the version."""

    def write(script: str, version: str = 'openjdk version "21"') -> Path:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\nif [ \"$1\" = -version ]; then echo '{version}' >&2; exit; fi\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return program

    return write
