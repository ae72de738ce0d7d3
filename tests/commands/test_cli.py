import csv
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SPLITS, Clipcap, Source

from clipcap_jax import datasets
from clipcap_jax.__main__ import EXAMPLES, make_parser
from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.commands import caption, cli
from clipcap_jax.datasets import open_split

PICTURES = sum(SPLITS.values())


@pytest.fixture
def photos(photos: Path) -> Path:
    """With a broken picture among them."""
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return photos


def expected_captions(run: Path, source: Source) -> list[str]:
    paths = sorted(source.pictures.iterdir())
    return [caption.text for caption in Captioner.load(run).caption(paths)]


def test_captions_on_the_screen(
    clipcap: Clipcap, pixels_run: Path, photos: Path, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "01.png").rename(photos / "01 \udcff.png")  # a name that is no UTF-8
    assert clipcap("caption", pixels_run, photos, "--batch-size", "3") == 0
    printed = capsys.readouterr()
    assert r"01 \udcff.png" in printed.out
    for text in expected_captions(pixels_run, source):
        assert text in printed.out
    assert printed.out.count(".png") == PICTURES - 1
    assert "00.PNG" in printed.out
    assert f"{PICTURES} captions, 1 pictures skipped" in printed.err
    assert "broken.jpg: The image is truncated or broken" in printed.err


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_captions_in_a_file(
    clipcap: Clipcap, pixels_run: Path, photos: Path, source: Source, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"captions{suffix}"
    strange = photos / "02 é\n\udcff,'\".png"  # a name that is no UTF-8, as POSIX allows
    (photos / "02.png").rename(strange)
    assert clipcap("caption", pixels_run, photos, "--output", output) == 0
    errors = "strict" if suffix == ".jsonl" else "surrogateescape"  # JSON is UTF-8
    with output.open(newline="", encoding="utf-8", errors=errors) as file:
        rows = list(map(json.loads, file)) if suffix == ".jsonl" else list(csv.DictReader(file))
    captions = {Path(row["image"]).name: row["caption"] for row in rows}
    names = [path.name for path in sorted(source.pictures.iterdir())]
    names[0], names[2] = "00.PNG", strange.name
    assert captions == dict(zip(names, expected_captions(pixels_run, source), strict=True))
    assert {str(row["finished"]) for row in rows} <= {"True", "False"}
    assert all(float(row["score"]) < 0 for row in rows)


def test_captions_are_not_lost(
    clipcap: Clipcap,
    pixels_run: Path,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither those of before, nor those that were made before an interrupt."""
    output, partial = tmp_path / "captions.jsonl", tmp_path / "captions.jsonl.partial"
    output.write_text("earlier")

    def interrupted(*_: Any) -> Iterator[tuple[str, Caption]]:
        yield "01.png", Caption("A picture.", True, -1.0)
        raise KeyboardInterrupt

    command = ("caption", pixels_run, source.pictures / "01.png", "--output", output)
    assert clipcap(*command) == 2
    assert f"{output} is there already" in capsys.readouterr().err.replace("\n", " ")
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_shared", interrupted)
        assert clipcap(*command, "--overwrite") == 130
    assert output.read_text() == "earlier"
    assert json.loads(partial.read_text())["caption"] == "A picture."
    assert str(partial) in capsys.readouterr().err.replace("\n", "")
    output.unlink()
    assert clipcap(*command) == 2
    assert f"{partial} is there already" in capsys.readouterr().err.replace("\n", " ")
    assert clipcap(*command, "--overwrite") == 0
    assert json.loads(output.read_text())["finished"] in (True, False)
    assert not partial.exists()


def test_a_score_that_is_not_finite_makes_no_caption(
    clipcap: Clipcap,
    pixels_run: Path,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def captions(*_: Any, **__: Any) -> Iterator[Caption]:
        return iter([Caption("", True, float("nan")), Caption("A picture.", True, -1.0)])

    monkeypatch.setattr(Captioner, "caption", captions)
    pictures = [source.pictures / name for name in ("01.png", "02.png")]
    assert clipcap("caption", pixels_run, *pictures, "--output", tmp_path / "captions.jsonl") == 0
    assert [json.loads(line)["score"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()] == [-1.0]
    assert "1 captions, 1 pictures skipped" in capsys.readouterr().err


def test_a_matrix_of_embeddings(
    clipcap: Clipcap, embeddings_run: Path, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "captions.jsonl"
    assert clipcap("caption", embeddings_run, source.embeddings, "--output", output, "--beam-size", "2") == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(row) for row in range(PICTURES)]
    captioner = Captioner.load(embeddings_run)
    search = captioner.with_decode(dataclasses.replace(captioner.decode, beam_size=2))
    assert [row["caption"] for row in rows] == [caption.text for caption in search.caption(np.load(source.embeddings))]
    assert "28 captions, 0 pictures skipped" in capsys.readouterr().err


def test_mistakes_are_told_without_a_traceback(
    clipcap: Clipcap,
    pixels_run: Path,
    embeddings_run: Path,
    source: Source,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = source.pictures / "01.png"
    (tmp_path / "text.npy").write_text("not a matrix")
    (tmp_path / "flat.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    full = tmp_path / "full.jsonl"
    (tmp_path / "full.jsonl.partial").symlink_to("/dev/full")
    for arguments, message in (
        (("caption", tmp_path / "no run", picture), "holds no checkpoints"),
        (("caption", pixels_run, picture, "--checkpoint", "77"), "there is no checkpoint '77'"),
        (("caption", pixels_run, tmp_path / "gone.jpg"), "there is no file, folder or glob"),
        (("caption", pixels_run, picture, "--output", "captions.txt"), "has to end in .jsonl or .csv"),
        (("caption", pixels_run, picture, "--output", tmp_path / "gone" / "c.csv"), "cannot be written"),
        (
            ("caption", pixels_run, picture, "--output", full, "--overwrite"),
            "cannot be written: No space left on device",
        ),
        (("caption", "s3://bucket/run", picture), "runs and their checkpoints lie on a disk"),
        (("caption", pixels_run, picture, source.embeddings), "not both"),
        (("caption", pixels_run, source.embeddings), "cannot caption embeddings"),
        (
            ("caption", embeddings_run, picture),
            "was trained on embeddings of width 5 from mean colour, not on pictures",
        ),
        (("caption", pixels_run, photos / "broken.jpg"), "none of the pictures could be read"),
        (("caption", embeddings_run, tmp_path / "text.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "flat.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "objects.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "gone.npy"), "No such file"),
        (("caption", pixels_run, picture, "--batch-size", "0"), "--batch-size"),
        (("caption", pixels_run, picture, "--beam-size", "0"), "--beam-size"),
        (("caption", pixels_run, picture, "--beam-size", "401"), "401"),
        (
            ("prepare", "records", "--name", "x", "--captions", tmp_path / "gone.jsonl", "--images", photos),
            "gone.jsonl",
        ),
    ):
        assert clipcap(*arguments) == 2, arguments
        printed = capsys.readouterr()
        assert message in printed.err.replace("\n", " "), arguments
        assert "Traceback" not in printed.err


def test_prepare_records(clipcap: Clipcap, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--captions", source.captions, "--images", source.pictures, "--data-dir", tmp_path)
    assert clipcap("prepare", "records", "--name", "mine", *files) == 0
    assert f"records/mine is prepared: {tmp_path}" in capsys.readouterr().out
    assert {split: len(open_split("records/mine", split, str(tmp_path))) for split in SPLITS} == SPLITS


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
    ("arguments", "usage"),
    [
        (("caption", "run", "a.png", "--beam_sise", "3"), "usage: clipcap caption "),
        (("prepare", "shapes", "--beam-size", "3"), "usage: clipcap prepare shapes "),
        (("evaluate", "--workdir=x", "--beam_sise=3"), "usage: clipcap evaluate "),
    ],
)
def test_a_slip_shows_how_its_verb_is_called(
    clipcap: Clipcap, arguments: tuple[str, ...], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clipcap(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(usage)
    assert "unrecognized arguments: --beam" in printed
