import io
import json
import os
import re
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from clipcap_jax.errors import UserError
from clipcap_jax.training import logs
from clipcap_jax.training.logs import MetricsLog, Monitor


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[Any]:
    """What TensorBoard's files hold, oldest first: TFRecords are length, checksum, data, checksum."""
    found = []
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = io.BytesIO(path.read_bytes())
        while header := content.read(12):
            found.append(event_pb2.Event.FromString(content.read(struct.unpack("<QI", header)[0])))
            content.read(4)
    return found


def scalars(run: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(run)
        for value in event.summary.value
        if not value.HasField("tensor")
    ]


def write(run: Path, first_step: int, steps: list[int]) -> None:
    log = MetricsLog(run, first_step)
    for step in steps:
        log.write(step, {"train/loss": step + 0.1, "val/CIDEr": 1e-9 * step})
    log.close()


def test_both_logs_hold_the_numbers(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    log = MetricsLog(run, 0)
    log.write(3, {"train/loss": 1 / 3, "val/CIDEr": 1.25})
    log.write(4, {"train/loss": 0.0})
    log.text(4, "val/captions", "1: ein Hündchen 🐕")
    assert lines(run) == [  # while it runs, too
        {"step": 3, "train/loss": 1 / 3, "val/CIDEr": 1.25},
        {"step": 4, "train/loss": 0.0},
    ]
    log.close()
    found = scalars(run)
    assert [(step, tag) for step, tag, _ in found] == [(3, "train/loss"), (3, "val/CIDEr"), (4, "train/loss")]
    assert [value for *_, value in found] == pytest.approx([1 / 3, 1.25, 0.0], rel=1e-6)
    values = [value for event in events(run) for value in event.summary.value]
    (text,) = [value for value in values if value.HasField("tensor")]
    assert text.tag.startswith("val/captions")
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val[0].decode() == "1: ein Hündchen 🐕"


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"val/loss": float("nan"), "val/CIDEr": float("inf")})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "val/loss": None, "val/CIDEr": None}]


@pytest.mark.parametrize("first_step", [0, 2, 3, 4, 9])
@pytest.mark.parametrize("broken", ["", "{", '{"step": 1, "train/lo', '{"step": 2}', "\0\0\n{}\n", "[]\n", "{}\n"])
def test_what_comes_after_the_restart_is_dropped(tmp_path: Path, first_step: int, broken: str) -> None:
    write(tmp_path, 0, [2, 4, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(broken)  # without an end of line: killed while it was written; zeros: after a power cut
    kept = [step for step in (2, 4, 4) if step <= first_step]
    log = MetricsLog(tmp_path, first_step)
    assert [line["step"] for line in lines(tmp_path)] == kept
    log.write(10, {"train/loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 10]
    # From this event on, TensorBoard forgets what earlier files say of these steps.
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts[-1] == first_step + 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has it")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    monkeypatch.setattr(log, "_file", open("/dev/full", "w", buffering=1))  # noqa: SIM115
    with pytest.raises(UserError, match=rf"logs of {tmp_path} cannot be written: No space left on device. .*make room"):
        log.write(1, {"train/loss": 1.0})
    log.close()


def test_tensorboards_files_are_full(tmp_path: Path) -> None:
    """Only they: the text is written nowhere else."""
    log = MetricsLog(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"logs of .* cannot be written: File too large"):
            log.text(1, "val/captions", 10_000 * "a dog ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match=rf"logs of {tmp_path} cannot be written"):
        MetricsLog(tmp_path, 0)


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    log = MetricsLog(tmp_path, 0)
    yield log
    log.close()


def monitor(log: MetricsLog, console: Console, **changes: Any) -> Monitor:
    options: dict[str, Any] = {"batch_size": 8, "log_every": 1, "start": 0, "total": 20, "losses": [], **changes}
    return Monitor(log, console, **options)


def metrics(loss: float, norm: float = 2.0, rate: float = 0.5) -> dict[str, Any]:
    return {"gradient_norm": jnp.float32(norm), "loss": jnp.float32(loss), "learning_rate": jnp.float32(rate)}


def test_steps_are_told_when_the_next_one_has_begun(log: MetricsLog, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    shown = monitor(log, console)
    shown.push(1, metrics(4.0, rate=0.25))
    assert lines(tmp_path) == []
    shown.push(2, metrics(3.0))
    assert [line["step"] for line in lines(tmp_path)] == [1]
    with shown.paused():
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    shown.close()
    first = lines(tmp_path)[0]
    del first["train/pairs_per_second"]
    assert first == {"step": 1, "train/loss": 4.0, "train/gradient_norm": 2.0, "train/learning_rate": 0.25}


def test_lines_give_the_mean_loss_and_the_rate_since_the_last_one(
    log: MetricsLog, tmp_path: Path, clock: Clock
) -> None:
    console = Console(file=io.StringIO())
    shown = monitor(log, console, log_every=3, start=4, losses=[7.0])  # of step 4, before the run was stopped
    for step in (5, 6, 7, 8, 9):
        shown.push(step, metrics(step))
        clock.now += 0.25
        if step == 8:
            assert shown.losses == [7.0]  # of step 7: that of step 8 may still be computing
            with shown.paused():
                assert shown.losses == [7.0, 8.0]
                clock.now += 100.0  # validating and saving are not training
    with shown.paused():
        pass
    shown.close()
    means = {line["step"]: line["train/loss"] for line in lines(tmp_path)}
    assert means == {6: (7 + 5 + 6) / 3, 9: (7 + 8 + 9) / 3}
    # Two steps of 8 pairs had begun 0.5 seconds before the first line, three more 0.75 seconds before the second.
    assert [line["train/pairs_per_second"] for line in lines(tmp_path)] == [2 * 8 / 0.5, 3 * 8 / 0.75]
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 6  loss 6.000  32 pairs/s",
        "step 9  loss 8.000  32 pairs/s",
    ]


def test_a_terminal_shows_loss_rate_and_time_left(log: MetricsLog, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    shown = monitor(log, console, total=8)
    for step in range(1, 5):
        shown.push(step, metrics(4.25))
    shown.flush()
    shown.close()
    rate = lines(tmp_path)[-1]["train/pairs_per_second"]
    drawn = console.file.getvalue().replace("\r", "\n").splitlines()  # type: ignore[attr-defined]
    (last,) = [line for line in drawn if "4/8" in line][-1:]
    assert f"loss 4.250  {rate:.0f} pairs/s" in last
    assert re.search(r"\d:\d\d:\d\d left \d:\d\d:\d\d", last)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_done_meanwhile_has_a_bar_of_its_own(log: MetricsLog, terminal: bool) -> None:
    """While it lasts; where there is no terminal, nothing."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    shown = monitor(log, console, total=8)
    with shown.beside("validating", 30) as advance:
        advance(10)
        advance(7)
        shown._progress.refresh()
    written = console.file.getvalue()  # type: ignore[attr-defined]
    shown.close()
    assert bool(re.search(r"training .*0/8 [^\n]*\n *validating .* 17/30 ", written)) == terminal
    assert bool(written) == terminal
    (last,) = shown._progress.tasks
    assert last.description == "training"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_not_finite_stops_the_run(log: MetricsLog, tmp_path: Path, name: str, bad: float) -> None:
    shown = monitor(log, Console(file=io.StringIO()))
    shown.push(6, metrics(1.0))
    shown.push(7, {**metrics(1.0), name: jnp.float32(bad)})
    message = rf"the {name.replace('_', ' ')} of step 7 is {bad}.*learning_rate"
    with pytest.raises(UserError, match=message), shown.paused():
        raise AssertionError("nothing may be saved")
    shown.close()
    assert [line["step"] for line in lines(tmp_path)] == [6]
