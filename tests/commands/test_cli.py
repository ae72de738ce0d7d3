import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import SPLITS, Clipcap, Source

from clipcap_jax import datasets, progress
from clipcap_jax.__main__ import EXAMPLES, make_parser
from clipcap_jax.commands import cli
from clipcap_jax.datasets import open_split

PICTURES = sum(SPLITS.values())


def test_mistakes_are_told_without_a_traceback(
    clipcap: Clipcap, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--captions", tmp_path / "gone.jsonl", "--images", photos)
    assert clipcap("prepare", "records", "--name", "x", *files) == 2
    printed = capsys.readouterr()
    assert "gone.jsonl" in printed.err.replace("\n", " ")
    assert "Traceback" not in printed.err


def test_quiet_and_debug(
    clipcap: Clipcap,
    source: Source,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_hidden", threading.Event())
    prepare = ("prepare", "records", "--captions", source.captions, "--data-dir", tmp_path, "--images")
    assert clipcap(*prepare, source.pictures, "--name", "loud") == 0
    assert "Preparing" in capsys.readouterr().out
    assert clipcap(*prepare, source.pictures, "--name", "quiet", "--quiet") == 0
    shown = capsys.readouterr()
    assert "Preparing" not in shown.out + shown.err
    assert "records/quiet is prepared" in shown.out
    assert clipcap(*prepare, tmp_path / "gone", "--name", "x", "--debug") == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "\nError: " in told


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", ["prefix", "prepare"]),
        ("caption --beam", ["--beam-size"]),
        ("submit co", ["coco"]),
        ("train --config coco_t", ["coco_transformer"]),
    ],
)
def test_the_shell_is_told_what_may_follow(typed: str, offered: list[str], tmp_path: Path) -> None:
    line = f"clipcap {typed}"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "told")}
    subprocess.run([sys.executable, "-m", "clipcap_jax"], env=os.environ | asked, check=True)
    assert sorted(word.strip() for word in (tmp_path / "told").read_text().split("|")) == offered


def test_prepare_records(clipcap: Clipcap, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--captions", source.captions, "--images", source.pictures, "--data-dir", tmp_path)
    assert clipcap("prepare", "records", "--name", "mine", *files) == 0
    assert f"records/mine is prepared: {tmp_path}" in capsys.readouterr().out
    assert {split: len(open_split("records/mine", split, str(tmp_path))) for split in SPLITS} == SPLITS


def test_prepare_records_in_shares(
    clipcap: Clipcap, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [path.name for path in source.pictures.iterdir()]
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{name},a photo\n" for name in names))
    files = ("--captions", tmp_path / "c.csv", "--images", source.pictures, "--data-dir", tmp_path, "--name", "mine")
    assert clipcap("prepare", "records", *files, "--shares", "50", "50", "0") == 0
    assert "were given one: train 50%, val 50%" in " ".join(capsys.readouterr().out.split())
    assert sum(len(open_split("records/mine", split, str(tmp_path))) for split in ("train", "val")) == len(names)
    for shares, message in (
        (("80", "10", "5"), "--shares are 95 percent together: they have to be 100, as 80 10 10"),
        (("80", "10", "-10"), "'-10' is not a number from 0 to 100"),
        (("80", "20"), "expected 3 arguments"),
        (("80", "10", "10", "--split", "val"), "not allowed with argument --shares"),
    ):
        assert clipcap("prepare", "records", *files, "--shares", *shares) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_cpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
        code += "; from clipcap_jax.commands import cli; print(cli.cpus())"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "1"
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cli.cpus() == os.cpu_count()


def test_options_of_beam(clipcap: Clipcap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command does not know is Beam's if that is to run, and otherwise an error."""
    given: list[Any] = []
    monkeypatch.setattr(datasets, "prepare_shapes", lambda data_dir, **options: given.append((data_dir, options)))
    others = ("--runner", "FlinkRunner", "--parallelism=4")
    assert clipcap("prepare", "shapes", *others, "--beam", "--data-dir", "there", "--processes", "3") == 0
    assert clipcap("prepare", "shapes", "--processes", "3") == 0
    assert given == [
        ("there", {"processes": 3, "beam": list(others)}),
        ("data", {"processes": 3, "beam": None}),
    ]
    assert clipcap("prepare", "shapes", *others) == 2
    assert "error: unrecognized arguments: --runner FlinkRunner --parallelism=4" in capsys.readouterr().err
    assert len(given) == 2


def test_a_script_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="130"):
        cli.run_script(interrupted)


SHOW = """
import sys
from pathlib import Path
from clipcap_jax.commands import cli
from clipcap_jax.progress import screen

def main():
    for _ in range(100):
        screen().print("木 \\udcff " + 1000 * "-", soft_wrap=True)
        screen(stderr=True).print("木 \\udcff")
    Path("done").touch()
    %s

cli.run_script(main)
"""


def show(folder: Path, end: str = "", redirected: str = "", encoding: str = "utf-8") -> tuple[int, str, str]:
    """Status and outputs of a program that shows what not every encoding has, and much of it, and then makes a file."""
    (folder / "done").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = f'set -o pipefail; "{sys.executable}" -c "$0" {redirected}'
    run = subprocess.run(["bash", "-c", command, SHOW % end], cwd=folder, env=environment, capture_output=True)
    out, err = run.stdout.decode(encoding), run.stderr.decode(encoding)
    assert (folder / "done").exists(), err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return run.returncode, out, err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_has_not_is_escaped(tmp_path: Path, encoding: str) -> None:
    status, out, err = show(tmp_path, encoding=encoding)
    tree = "木" if encoding == "utf-8" else r"\u6728"
    assert status == 0
    assert out.startswith(rf"{tree} \udcff ---")
    assert err.count(rf"{tree} \udcff") == 100


@pytest.mark.parametrize("end", ["", "sys.exit()"])  # as absl ends the scripts
def test_a_reader_that_has_gone_ends_nothing(tmp_path: Path, end: str) -> None:
    status, out, err = show(tmp_path, end, "| head -n 1")
    assert (status, out[0], err.count("\n")) == (0, "木", 100)
    assert show(tmp_path, end, ">&- 2>&-")[0] == 0
    assert show(tmp_path, "raise cli.UserError('mine')", "| true")[0] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has it")
@pytest.mark.parametrize("end", ["", "sys.exit()"])
def test_what_could_not_be_shown_is_told_in_the_end(tmp_path: Path, end: str) -> None:
    status, _, err = show(tmp_path, end, ">/dev/full")
    assert status == 2
    assert err.endswith("Error: not all was written to stdout: No space left on device\n")


def test_the_command_itself_imports_nothing_slow() -> None:
    """`clipcap --help` answers at once: what takes seconds to import, the commands that need it import."""
    code = "import sys, clipcap_jax.__main__; print({'jax', 'tensorflow_datasets'} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_every_verb_has_an_example_that_it_takes(clipcap: Clipcap, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, example in EXAMPLES.items():
        program, *arguments = shlex.split(example)
        assert (program, arguments[0]) == ("clipcap", verb)
        _, others = make_parser().parse_known_args(arguments)
        assert all(argument.startswith("--config.") for argument in others)
        assert clipcap(verb, "--help") == 0
        assert f"Example: {example}" in capsys.readouterr().out


def test_alone_it_shows_how_it_is_called(clipcap: Clipcap, capsys: pytest.CaptureFixture[str]) -> None:
    assert clipcap() == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {verb} " in printed for verb in EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "usage", "hint"),
    [
        (("caption", "run", "a.png", "--beam_size", "3"), "usage: clipcap caption ", "did you mean --beam-size?"),
        (("prepare", "shapes", "--beam-size", "3"), "usage: clipcap prepare shapes ", "--beam-size 3\n"),
        (("evaluate", "--workdir=x", "--beam_sise=3"), "usage: clipcap evaluate ", "did you mean --beam_size?"),
        (("train", "--beam_sise=3"), "usage: clipcap train ", "mean --config.evaluate.decode.beam_size?"),
        (("train", "--batch-size", "3"), "usage: clipcap train ", "did you mean --config.evaluate.batch_size or"),
    ],
)
def test_a_slip_shows_how_its_verb_is_called(
    clipcap: Clipcap, arguments: tuple[str, ...], usage: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clipcap(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(usage)
    assert "unrecognized arguments: --b" in printed
    assert hint in printed
