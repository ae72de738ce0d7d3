import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import device
import needs
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
    needs.skip_without("torch")
    lines = run()
    settings = Settings(seconds=0.01, dtype="", tiny=True, commit="")
    assert list(lines) == [case.name for case in cases.cases(settings)]
    errors = {name for name, line in lines.items() if "error" in line}
    assert errors == {f"variants/{kind}/attention by cuDNN" for kind in ("transformer", "search")}  # on a CPU
    for name, line in lines.items():
        if name.startswith("parity/") and "float32" in name:
            assert line["passed"]


def test_what_a_run_begins_with() -> None:
    needs.skip_without("torch")
    lines = run("--only", "training/mlp/8/ours", "training/mlp/8/original", "captioning", "towers")
    assert len(lines) == 10
    assert not [line for line in lines.values() if "error" in line]
    assert lines["captioning/same"]["same"] == lines["captioning/same"]["of"] == 2
    assert all(line["difference"] < 1e-5 for line in lines.values() if "difference" in line)
    assert all(line["rate"] > 0 for name, line in lines.items() if name != "captioning/same")


class Lowered:
    """As of `jax.jit`, if a program takes no time to compile, or very long."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def compile(self, compiler_options: object) -> "Lowered":
        time.sleep(self.seconds)
        return self

    def memory_analysis(self) -> None:
        return None


def fail(*_: object) -> Any:
    raise ValueError("of a test")


CASES = [
    Case("a/run", fail),
    Case("a/lower", lambda program: {}, lower=fail),
    Case("b/program", fail, lower=Lowered),
    Case("b/slow", lambda program: {}, lower=lambda: Lowered(3.0)),
    Case("b/last", lambda: {"seconds": 1.0}),
]


def test_a_case_that_fails_is_a_line() -> None:
    lines: list[dict[str, Any]] = []
    device.run_cases(CASES, (), lines.append, compile_limit=0.5)
    found = {line["case"]: line for line in lines if "case" in line}
    assert list(found) == [case.name for case in CASES]
    assert [found[name].get("error") for name in list(found)[:3]] == ["ValueError: of a test"] * 3
    assert found["b/slow"]["error"] == "not compiled after 0 seconds"
    assert found["b/last"]["seconds"] == 1.0


def test_what_is_done_is_not_done_again() -> None:
    lines: list[dict[str, Any]] = []
    device.run_cases(CASES, (0, 2, 3), lines.append)
    assert [line["case"] for line in lines if "case" in line] == ["a/lower", "b/last"]


# What `device.py` starts as its worker: with the numbers of the cases that are done.
WORKER = """
import json, os, sys, time
done = sys.argv[-1].removeprefix("--skip=").split(",")
def show(line): print(json.dumps(line), flush=True)
print("{'a': 'library says'}", flush=True)
show({"begin": {0: "compiled", 1: "compiled too"}})
if "0" not in done: os.abort()
if "2" not in done:
    show({"begin": {2: "hangs"}})
    time.sleep(60)
show({"begin": {3: "last"}})
show({"case": "last", "seconds": 1.0})
"""


def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, limit: float, case_limit: float) -> None:
    script = tmp_path / "worker.py"
    script.write_text(worker)
    monkeypatch.setattr(device, "__file__", str(script))
    device.supervise([], limit, case_limit)


def test_a_death_and_a_hang_cost_their_cases_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised(tmp_path, monkeypatch, WORKER, limit=60, case_limit=3)
    assert [json.loads(text) for text in capfd.readouterr().out.splitlines()] == [
        {"case": "compiled", "error": "the process died: exit status -6"},
        {"case": "compiled too", "error": "the process died: exit status -6"},
        {"case": "hangs", "error": "not finished after 3 seconds"},
        {"case": "last", "seconds": 1.0},
    ]


def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    supervised(tmp_path, monkeypatch, WORKER.replace("os.abort()", "time.sleep(60)"), limit=2, case_limit=60)
    (*_, last) = [json.loads(text) for text in capfd.readouterr().out.splitlines()]
    assert last["error"] == "not finished after 2 seconds in all; what follows was not begun"


def test_nothing_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        supervised(tmp_path, monkeypatch, "import no_such_module", limit=60, case_limit=60)
    assert json.loads(capfd.readouterr().out) == {"case": "start", "error": "the process died: exit status 1"}


def runs(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # one that has ended, but nobody has asked how


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_its_process_ends_with_it(signum: signal.Signals) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", "captioning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.05)
        process.send_signal(signum)
        process.wait()
    deadline = time.monotonic() + 60
    while runs(found[0]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_measuring() -> None:
    waited: list[int] = []
    results = iter(range(10_000))
    line = measure(lambda: next(results), waited.append, seconds=0.0)
    assert line["calls"] == 1
    assert waited == [0, 1]  # the first, which may compile, and one that is measured
    assert line["spread"][0] <= line["seconds"] <= line["spread"][1]


def test_what_is_not_a_number_is_no_parity() -> None:
    case = cases.parity_case("mlp", "float32")
    assert case.lower
    program = case.lower().compile()
    assert case.run(program)["passed"]

    def broken(*arguments: Any) -> Any:
        ((loss, logits), gradients), found = program(*arguments)
        return ((loss * float("nan"), logits), gradients), found

    assert not case.run(broken)["passed"]
