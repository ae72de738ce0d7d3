import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import needs
import pytest
import tiny
from tiny import Clipcap, make_config

from clipcap_jax.checkpoints import store
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen
from clipcap_jax.training import wandb_log
from clipcap_jax.training.logs import NoLog
from clipcap_jax.training.wandb_log import WandbLog, check


class UsageError(Exception):
    pass


class Service:
    """As much of the package as is used: `away` says what fails, `runs` what was logged, by the runs' ids."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.begun = False
        self.errors = SimpleNamespace(UsageError=UsageError)

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        if "/" in settings.get("project", ""):
            raise UsageError("Invalid project name.")
        return settings

    def login(self) -> None:
        if "login" in self.away:
            raise ConnectionError("nobody there")

    def teardown(self) -> None:
        self.begun = False

    def init(self, **options: Any) -> Any:
        self.asked.append(options)
        assert not self.begun
        self.begun = True
        if "init" in self.away and options["mode"] != "offline":
            raise ConnectionError("nobody there\nand more")
        lines = self.runs.setdefault(options["id"], [])

        def log(values: dict[str, float], *, step: int) -> None:
            if "log" in self.away:
                raise BrokenPipeError
            lines.append((step, values))

        def finish(*, exit_code: int) -> None:
            self.begun = False
            self.exit_codes.append(exit_code)
            if "finish" in self.away:
                threading.Event().wait()

        offline = options["mode"] == "offline"
        folder = Path(options["dir"], "wandb", "a-run", "files")
        return SimpleNamespace(log=log, finish=finish, offline=offline, url="https://w.example/run", dir=str(folder))


class Lines(NoLog):
    def __init__(self) -> None:
        self.lines: list[Any] = []

    def write(self, step: int, values: Any) -> None:
        self.lines.append((step, values))

    def text(self, step: int, name: str, text: str) -> None:
        self.lines.append(text)

    def keep(self) -> None:
        self.lines.append("kept")

    def close(self) -> None:
        self.lines.append("closed")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def write(run: Path, steps: list[int]) -> tuple[list[Any], str]:
    """Log at these steps; what reached the other log, and what was told."""
    printed, lines = io.StringIO(), Lines()
    log = WandbLog(lines, "tiny", run, make_config(run), screen(file=printed, width=200))
    for step in steps:
        log.write(step, {"train/loss": step + 0.5})
    log.text(steps[-1], "val/captions", "a dog")
    log.keep()
    log.close()
    return lines.lines, printed.getvalue()


def test_the_same_numbers_in_the_same_run_when_training_goes_on(service: Service, tmp_path: Path) -> None:
    lines, told = write(tmp_path, [1, 2])
    assert lines == [(1, {"train/loss": 1.5}), (2, {"train/loss": 2.5}), "a dog", "kept", "closed"]
    assert told == "W&B: https://w.example/run\n"
    write(tmp_path, [3])
    [logged] = service.runs.values()
    assert logged == [(step, {"train/loss": step + 0.5}) for step in (1, 2, 3)]
    assert service.asked[0]["config"]["train"]["batch_size"] == 8
    assert service.asked[0]["resume"] == "allow"


@pytest.mark.parametrize(
    ("away", "logged", "message"),
    [
        ("init", 2, "Warning: W&B: nobody there\nW&B: offline; `wandb sync {}/wandb/a-run` sends the numbers\n"),
        ("log", 0, "W&B: https://w.example/run\nWarning: W&B: BrokenPipeError\n"),
        ("finish", 2, "not all was sent within 0 s; `wandb sync {}/wandb/a-run` sends the rest\n"),
    ],
)
def test_a_service_that_is_away_stops_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str, logged: int, message: str
) -> None:
    monkeypatch.setattr(wandb_log, "_PATIENCE", 0.05)
    service.away = {away, "login"}
    check("tiny")
    lines, told = write(tmp_path, [1, 2])
    assert len(lines) == 5
    assert message.format(tmp_path) in told
    assert [len(found) for found in service.runs.values()] == [logged]


def test_mistakes(
    clipcap: Clipcap, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(UserError, match=r"--wandb a/b: Invalid project name\. With WANDB_MODE=offline"):
        check("a/b")
    for nothing in (None, SimpleNamespace()):  # the latter as of a folder that is called wandb
        monkeypatch.setitem(sys.modules, "wandb", nothing)
        assert clipcap("train", "--config=shapes", f"--workdir={tmp_path / 'run'}", "--wandb", "tiny") == 2
        assert 'pip install "clipcap_jax[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_numbers_of_a_training(clipcap: Clipcap, service: Service, data_dir: Path, tmp_path: Path) -> None:
    command = ["train", f"--config={tiny.__file__}", f"--workdir={tmp_path}", f"--config.data.data_dir={data_dir}"]
    assert clipcap(*command, "--config.train.epochs=1", "--wandb=mine") == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [logged] = service.runs.values()
    assert [{"step": step, **values} for step, values in logged] == lines
    assert "val/CIDEr" in lines[-1]
    assert [options["project"] for options in service.asked] == ["mine"]
    assert service.exit_codes == [0]


def test_a_training_that_fails(
    clipcap: Clipcap, service: Service, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service shows it as such."""
    monkeypatch.setattr(store.Checkpoints, "wait", mock.Mock(side_effect=UserError("the disk is full")))
    command = ["train", f"--config={tiny.__file__}", f"--workdir={tmp_path}", f"--config.data.data_dir={data_dir}"]
    assert clipcap(*command, "--config.train.epochs=1", "--wandb=mine") == 2
    assert service.exit_codes == [1]


_WRITE = """
import sys
from pathlib import Path
from tiny import make_config
from clipcap_jax.progress import screen
from clipcap_jax.training import logs, wandb_log
run = Path(sys.argv[1])
wandb_log.check("tiny")
for step in (1, 2):
    log = wandb_log.WandbLog(logs.MetricsLog(run, step - 1), "tiny", run, make_config(run), screen(width=1000))
    log.write(step, {"train/loss": step / 7, "val/CIDEr": float("nan")})
    log.close()
"""


def test_the_package_itself(tmp_path: Path) -> None:
    """Offline, where each start has a folder of its own; that they are one run its name says."""
    needs.skip_without("wandb")
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [sys.executable, "-c", _WRITE, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    name = (tmp_path / "wandb_id").read_text().strip()
    folders = [Path(folder) for folder in re.findall("`wandb sync (.*?)`", ended.stdout)]
    for step, folder in zip((1, 2), folders, strict=True):
        assert re.search(rf"-{name}(-1)?$", folder.name)  # the latter where both started in one second
        sent = (folder / f"run-{name}.wandb").read_bytes()
        assert b"train/loss" in sent
        assert json.dumps(step / 7).encode() in sent
