"""What `pip install` puts on a machine without a clone: all that trains, evaluates and captions.

The wheel is made from the source package, which so holds all that it takes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import Source

ROOT = Path(__file__).parents[1]


def finished(*command: object, cwd: Path, environment: dict[str, str]) -> str:
    run = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.mark.slow
def test_a_wheel_trains_and_evaluates_outside_of_a_clone(data_dir: Path, source: Source, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "build", "mutants", "runs"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    pack = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    finished(sys.executable, "-c", pack, cwd=clone, environment=environment)
    [source_package] = tmp_path.glob("*.tar.gz")
    with tarfile.open(source_package) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"train.py", "tests/tiny.py", "docs/conf.py", "LICENSE", "CITATION.cff"} <= names
    build = (*pip, "wheel", source_package, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    finished(sys.executable, *build, cwd=tmp_path, environment=environment)
    [wheel] = tmp_path.glob("*.whl")
    held = {name.removeprefix("clipcap_jax/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py")} <= held
    files = (path for path in (ROOT / "clipcap_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(ROOT / "clipcap_jax")) for path in files} <= held

    venv.create(tmp_path / "venv", with_pip=True)
    binaries, folder = tmp_path / "venv" / "bin", tmp_path / "elsewhere"
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(
        sysconfig.get_path("purelib")
    )  # whose own .pth files, of a clone, do not count
    finished(binaries / "python", *pip, "install", "--no-deps", wheel, cwd=tmp_path, environment=environment)
    shutil.rmtree(clone)
    folder.mkdir()

    def clipcap(*arguments: object) -> str:
        return finished(binaries / "clipcap", *arguments, cwd=folder, environment=environment)

    assert (
        "flickr8k"
        in subprocess.run(
            [binaries / "clipcap", "train", "--config=gone"],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        ).stderr.partition("by their names there are")[2]
    )
    config = ("--config=flickr8k:pixels", f"--config.data.data_dir={data_dir}", "--config.data.name=records/both")
    small = ("model.gpt2.width=32", "model.clip.width=32", "model.gpt2.vocab_size=320", "train.batch_size=8")
    settings = [f"--config.{setting}" for setting in (*small, "train.epochs=0.4", "evaluate.images=4")]
    assert "Trained 2 steps. The run is in runs/x" in clipcap("train", *config, "--workdir=runs/x", *settings)
    assert "CIDEr" in clipcap("evaluate", "--workdir=runs/x", "--split=val", "--no-meteor")
    assert len(list(folder.glob("runs/x/evaluations/*/page.html"))) == 1
    assert clipcap("caption", "runs/x", source.pictures / "01.png", "--output=captions.jsonl")
    assert (folder / "captions.jsonl").read_text().count("\n") == 1
