import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import device
import pytest
from cases import Case, Settings, measure

SCRIPT = Path(device.__file__)


def run(*arguments: str, path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The lines of the program, by their cases."""
    environment = {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(path or "")}  # a benchmark is of one device
    command = [sys.executable, str(SCRIPT), "--tiny", "--seconds=0.01", "--limit=800", "--case-limit=700", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    return {line["case"]: line for line in lines}


def test_what_is_missing_or_dies_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "optax.py").write_text("raise ModuleNotFoundError('no optax here')")
    (tmp_path / "torch.py").write_text("import os\nos.abort()")
    chosen = (
        "device",
        "parity/mlp/float32",
        "training/mlp",
        "captioning/2/ours",
        "captioning/1",
        "towers/tiny ViT/ours",
    )
    lines = run("--only", *chosen, path=tmp_path)
    assert "no optax here" in lines["training/mlp/8/ours"]["error"]
    assert "the process died: exit status -6" in lines["training/mlp/8/original"]["error"]
    assert "the process died" in lines["captioning/1/original"]["error"]
    assert lines["parity/mlp/float32"]["passed"]
    assert lines["device"]["product"] > 0
    assert lines["captioning/2/ours"]["rate"] > 0
    assert lines["towers/tiny ViT/ours"]["rate"] > 0


@pytest.mark.slow
def test_all_of_it() -> None:
    lines = run()
    settings = Settings(seconds=0.01, dtype="", tiny=True, commit="")
    assert list(lines) == [case.name for case in cases.cases(settings)]
    errors = {name for name, line in lines.items() if "error" in line}
    assert errors == {"variants/transformer/attention by cuDNN"}  # on a CPU
    assert lines["captioning/same"]["same"] == lines["captioning/same"]["of"] == 2
    for name, line in lines.items():
        if name.startswith("parity/") and "float32" in name:
            assert line["passed"]
        if name.startswith("variants/mlp/") and "threefry" not in name:  # which draws other bits
            assert line["loss"] == pytest.approx(lines["variants/mlp/as it is"]["loss"], rel=1e-2)


def test_ours_train_on_what_theirs_train_on() -> None:
    """A tiny run of the parts that every device run begins with."""
    pytest.importorskip("torch", reason="needs the torch extra")
    lines = run("--only", "training/mlp", "captioning", "towers")
    assert not [line for line in lines.values() if "error" in line]
    assert lines["training/mlp/8/original"]["loss"] == pytest.approx(lines["training/mlp/8/ours"]["loss"], rel=0.05)
    assert lines["captioning/same"] | {"same": 2, "of": 2} == lines["captioning/same"]
    assert all(line["difference"] < 1e-5 for line in lines.values() if "difference" in line)


def test_a_case_that_raises_is_a_line() -> None:
    def fail(*_: object) -> Any:
        raise ValueError("of a test")

    class Lowered:
        def compile(self, compiler_options: object) -> "Lowered":
            return self

        def memory_analysis(self) -> None:
            return None

    chosen = [
        Case("a/run", fail),
        Case("a/lower", lambda program: {}, lower=fail),
        Case("b/program", fail, lower=Lowered),
        Case("b/last", lambda: {"seconds": 1.0}),
    ]
    lines: list[dict[str, Any]] = []
    device.run_cases(chosen, 0, lines.append)
    found = {line["case"]: line for line in lines if "case" in line}
    assert list(found) == [case.name for case in chosen]
    assert [found[name].get("error") for name in list(found)[:3]] == ["ValueError: of a test"] * 3
    assert found["b/last"]["seconds"] == 1.0

    lines.clear()
    device.run_cases(chosen, 3, lines.append)
    assert [line["case"] for line in lines if "case" in line] == ["b/last"]


@pytest.mark.parametrize(("arguments", "message"), [((), "in all"), (("--case-limit=0.2",), "after 0 seconds")])
def test_it_ends_in_time(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", "device", "--limit=0.3", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert message in json.loads(done.stdout.splitlines()[0])["error"]


def test_measuring() -> None:
    waited: list[int] = []
    results = iter(range(10_000))
    line = measure(lambda: next(results), waited.append, seconds=0.0)
    assert line["calls"] == 1
    assert waited == [0, 1]  # the first, which may compile, and one that is measured
    assert line["spread"][0] <= line["seconds"] <= line["spread"][1]
