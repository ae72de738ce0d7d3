import csv
import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SPLITS, Clipcap, Source
from web import Web

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.commands import caption, outputs
from clipcap_jax.commands.sidecars import Sidecars
from clipcap_jax.errors import UserError
from clipcap_jax.metrics import coco_files

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
    clipcap: Clipcap,
    pixels_run: Path,
    photos: Path,
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    (photos / "01.png").rename(photos / "01 \udcff.png")  # a name that is no UTF-8
    assert clipcap("caption", pixels_run, photos, "--batch-size", "3") == 0
    printed = capsys.readouterr()
    assert r"01 \udcff.png" in printed.out
    for text in expected_captions(pixels_run, source):
        assert text in printed.out
    assert printed.out.count(".png") == PICTURES - 1
    assert "00.PNG" in printed.out
    assert f"{PICTURES} captions, 1 picture skipped" in printed.err
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
    [broken] = [row for row in rows if Path(row["image"]).name == "broken.jpg"]
    assert "truncated or broken" in broken["error"]
    assert not broken.get("caption")
    rows.remove(broken)
    captions = {Path(row["image"]).name: row["caption"] for row in rows}
    names = [path.name for path in sorted(source.pictures.iterdir())]
    names[0], names[2] = "00.PNG", strange.name
    assert captions == dict(zip(names, expected_captions(pixels_run, source), strict=True))
    assert {str(row["finished"]) for row in rows} <= {"True", "False"}
    assert all(float(row["score"]) < 0 for row in rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupted_after(count: int) -> Callable[..., Iterator[dict[str, Any]]]:
    """In the place of `_shared`: it gives so many rows, then Ctrl-C comes."""
    made = caption._shared

    def interrupted(*arguments: Any) -> Iterator[dict[str, Any]]:
        yield from itertools.islice(made(*arguments), count)
        raise KeyboardInterrupt

    return interrupted


def test_captions_are_not_lost(
    clipcap: Clipcap,
    pixels_run: Path,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither those of before, nor those that were made before an interrupt, nor is anything else taken for them."""
    output, partial = tmp_path / "captions.jsonl", tmp_path / "captions.jsonl.partial"
    output.write_text("earlier")

    def interrupted(*_: Any) -> Iterator[dict[str, Any]]:
        captions = [{"caption": "A picture.", "score": -1.0, "finished": True}]
        yield {"image": str(source.pictures / "01.png"), "captions": captions}
        raise KeyboardInterrupt

    pictures = [source.pictures / name for name in ("01.png", "02.png")]
    command = ("caption", "--output", output, pixels_run, *pictures)
    assert clipcap(*command) == 2
    assert f"{output} is there already" in capsys.readouterr().err.replace("\n", " ")
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_shared", interrupted)
        assert clipcap(*command, "--overwrite") == 130
    assert output.read_text() == "earlier"
    assert rows_of(partial)[1]["captions"][0]["caption"] == "A picture."
    assert f"What is done is in {partial}" in capsys.readouterr().err.replace("\n", "")
    output.unlink()
    best = Captioner.load(pixels_run).step
    other = next(path.name for path in (pixels_run / "checkpoints").iterdir() if path.name != str(best))
    for changed, told in (
        (("--beam-size", "2"), "beam_size: 1, now 2"),
        ((source.pictures / "03.png",), "pictures: 2 ("),
        (("--checkpoint", other), f"checkpoint: step {best}, "),
        (("--prefix", "x "), "prefix: , now x "),
        (("--n", "2"), "n: 1, now 2"),
        (("--banned", "red", "--banned", "a dog"), "banned: None, now ['red', 'a dog']"),
        (("--top-k", "5"), "top_k: None, now 5; seed: None, now 0"),
    ):
        assert clipcap(*command, *changed) == 2
        assert told in capsys.readouterr().err
    with partial.open("a") as file:
        file.write('{"image": "torn')
    assert clipcap(*command) == 0
    assert "Going on after 1 of 2 pictures" in capsys.readouterr().err
    first, second = rows_of(output)
    assert first["caption"] == "A picture."
    assert second["image"] == str(pictures[1])
    assert not partial.exists()

    partial.write_text("someone else's")
    assert clipcap(*command, "--overwrite") == 0
    assert rows_of(output)[0]["caption"] != "A picture."
    output.unlink()
    partial.write_text("someone else's")
    assert clipcap(*command) == 2
    assert "nothing to go on with" in capsys.readouterr().err
    assert partial.read_text() == "someone else's"


def test_every_kind_of_file(
    clipcap: Clipcap, pixels_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same captions, and a text around each."""
    (photos / "02.png").rename(photos / "COCO_val2014_000000000042.png")
    run = ("caption", pixels_run, photos, "--prefix", "a <photo>: ", "--suffix", "!")
    assert clipcap(*run) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = {row["image"]: row["caption"] for row in rows if "caption" in row}
    assert len(expected) == PICTURES
    assert all(text.startswith("a <photo>: ") and text.endswith("!") for text in expected.values())
    for name in ("c.json", "c.html"):
        assert clipcap(*run, "--output", tmp_path / name) == 0
    assert coco_files.read_results(tmp_path / "c.json") == expected
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png") == PICTURES
    assert page.count("a &lt;photo&gt;: ") == 2 * PICTURES  # and as the picture's description
    assert page.count("truncated or broken") == 1
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.tmp"))

    coco = photos / "COCO_val2014_000000000042.png"
    assert clipcap("caption", pixels_run, coco, "--output", tmp_path / "coco.json") == 0
    assert json.loads((tmp_path / "coco.json").read_text())[0]["image_id"] == 42
    parquet = pytest.importorskip("pyarrow.parquet")
    assert clipcap(*run, "--output", tmp_path / "c.parquet") == 0
    table = parquet.read_table(tmp_path / "c.parquet").to_pylist()
    assert {row["image"]: row["caption"] for row in table if not row["error"]} == expected
    assert len(table) == PICTURES + 1


def test_what_a_file_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        outputs.check(tmp_path / "c.parquet", 1)
    with pytest.raises(UserError, match="COCO's results have one caption of each picture"):
        outputs.check(tmp_path / "c.json", 2)
    with pytest.raises(UserError, match="up to 3,000 pictures, not 3,001"):
        outputs.check_inputs(tmp_path / "c.html", [tmp_path] * (outputs.PAGE + 1))


def test_sidecars(
    clipcap: Clipcap, pixels_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("caption", pixels_run, photos, "--sidecar", ".txt")
    (photos / "05.txt").write_text("mine")
    assert clipcap(*run) == 2
    assert f"1 text of {PICTURES + 1} are there already, the first {photos / '05.txt'}" in capsys.readouterr().err
    assert len(list(photos.rglob("*.txt"))) == 2  # with the notes
    assert clipcap(*run, "--existing", "skip") == 0
    assert (photos / "05.txt").read_text() == "mine"
    texts = {path: path.read_text().strip() for path in photos.rglob("*.txt") if path.name != "notes.txt"}
    assert len(texts) == PICTURES
    assert (photos / "more [new]" / "00.txt") in texts
    assert clipcap(*run, "--existing", "overwrite") == 0
    own = (photos / "05.txt").read_text().strip()
    assert own != "mine"
    for existing, expected in (("append", f"{own} {own}."), ("prepend", f"{own}. {own} {own}.")):
        assert clipcap(*run, "--existing", existing, "--suffix", ".") == 0
        assert (photos / "05.txt").read_text().strip() == expected
    assert clipcap(*run, "--output", tmp_path / "texts") == 0
    assert (tmp_path / "texts" / "more [new]" / "00.txt").read_text().strip() == texts[photos / "more [new]" / "00.txt"]
    assert len(list((tmp_path / "texts").rglob("*"))) == PICTURES + 1  # one folder, and nothing else
    (photos / "05.jpg").write_bytes((photos / "05.png").read_bytes())
    assert clipcap(*run, "--existing", "skip") == 2
    assert "05.png and another picture would both have" in capsys.readouterr().err.replace("\n", " ")


def test_a_text_is_not_added_twice(tmp_path: Path) -> None:
    """Where a kill came between its note and what follows."""
    picture = tmp_path / "a.png"
    (tmp_path / "a.txt").write_text("a dog")
    for existing, expected in (("append", "a dog a cat\n"), ("prepend", "a bird a dog a cat\n")):
        texts = Sidecars(".txt", existing)
        for again in (False, True):
            texts.write(picture, ["a cat" if existing == "append" else "a bird"], again=again)
            assert (tmp_path / "a.txt").read_text() == expected
    for again in (False, True):
        Sidecars(".txt", "append").write(picture, ["two", "li\nnes"], again=again)
        assert (tmp_path / "a.txt").read_text() == "a bird a dog a cat\ntwo\nli nes\n"


def test_lists_and_tars(
    clipcap: Clipcap,
    pixels_run: Path,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures = sorted(source.pictures.iterdir())
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for picture in pictures[:5]:
            tar.add(picture, f"in/{picture.name}")
            tar.addfile(tarfile.TarInfo(f"in/{picture.stem}.json"))
    (tmp_path / "list.txt").write_text("".join(f"{picture}\r\n\n" for picture in pictures[5:7]))
    stdin = f"{pictures[7]}\n{tmp_path / 'gone.png'}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert clipcap("caption", pixels_run, tmp_path / "*.tar", f"@{tmp_path / 'list.txt'}", "-") == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    named = [f"{tmp_path}/0.tar/in/{picture.name}" for picture in pictures[:5]] + list(map(str, pictures[5:8]))
    assert [row["image"] for row in rows] == [*named, str(tmp_path / "gone.png")]
    assert [row["caption"] for row in rows[:-1]] == expected_captions(pixels_run, source)[:8]
    assert "No such file" in rows[-1]["error"]
    assert "Not looked at: 5 .json in tars" in printed.err
    assert clipcap("caption", pixels_run, tmp_path / "0.tar", "--sidecar", ".txt") == 2
    assert "have no place beside them" in capsys.readouterr().err
    assert clipcap("caption", pixels_run, tmp_path / "0.tar", "--sidecar", ".txt", "--output", tmp_path / "t") == 0
    assert {path.name for path in (tmp_path / "t").iterdir()} == {f"{picture.stem}.txt" for picture in pictures[:5]}


def test_addresses(
    clipcap: Clipcap,
    pixels_run: Path,
    source: Source,
    web: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Captioned like files, under the names that were given, from where a job was stopped."""
    pictures = sorted(source.pictures.iterdir())
    web.files = {picture.name: picture.read_bytes() for picture in pictures[:3]} | {"page": b"<html>"}
    urls = [web.url(name) for name in ("00.png#here", "gone.png", "01.png", "page", "?to=file:///etc/passwd", "02.png")]
    (tmp_path / "list").write_text("\n".join(urls[1:]))
    output = tmp_path / "c.jsonl"
    run = ("caption", pixels_run, urls[0], f"@{tmp_path / 'list'}", pictures[3], "--batch-size", "4")
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_shared", interrupted_after(3))
        assert clipcap(*run, "--output", output) == 130
    del web.files["01.png"]
    assert clipcap(*run, "--output", output) == 0
    assert "4 captions, 3 pictures skipped" in capsys.readouterr().err
    rows = rows_of(output)
    assert [row["image"] for row in rows] == [*urls, str(pictures[3])]
    assert [row["caption"] for row in rows if "caption" in row] == expected_captions(pixels_run, source)[:4]
    for row, reason in zip([rows[i] for i in (1, 3, 4)], ("answers 404", "a web page", "302 Found"), strict=True):
        assert reason in row["error"]
    assert clipcap(*run, "--output", tmp_path / "c.html") == 0
    assert (tmp_path / "c.html").read_text().count("data:image/png") == 3
    capsys.readouterr()
    assert clipcap(*run, "--sidecar", ".txt", "--output", tmp_path / "t") == 2
    assert "--sidecar is for pictures on a disk, not for embeddings or addresses" in capsys.readouterr().err
    assert clipcap("caption", pixels_run, tmp_path / "list") == 2
    assert "it is a list of addresses, which `clipcap caption` reads if @ stands" in capsys.readouterr().err


def test_duplicates_and_the_best_first(
    clipcap: Clipcap, pixels_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that was stopped, too."""
    for name, same in (("04 again.png", "03.png"), ("zz.png", "03.png")):
        (photos / name).write_bytes((photos / same).read_bytes())
    run, output = ("caption", pixels_run, photos, "--batch-size", "4"), tmp_path / "c.jsonl"
    assert clipcap(*run, "--output", output) == 0
    plain = rows_of(output)
    marked = (*run, "--duplicates", "0.9999", "--best-first", "--output", tmp_path / "d.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_shared", interrupted_after(20))
        assert clipcap(*run, "--duplicates", "0.5", "--output", tmp_path / "d.jsonl") == 130
    assert clipcap(*marked) == 0
    rows = rows_of(tmp_path / "d.jsonl")
    assert "broken.jpg" in rows[-1]["image"]
    assert [row["score"] for row in rows[:-1]] == sorted((row["score"] for row in rows[:-1]), reverse=True)
    firsts = {row["image"]: row.pop("duplicate_of") for row in rows if "duplicate_of" in row}
    assert firsts[str(photos / "04 again.png")] == firsts[str(photos / "zz.png")] == str(photos / "03.png")
    assert len(firsts) < PICTURES
    rows.sort(key=lambda row: str(row["image"]))
    assert [(row["image"], row.get("caption")) for row in rows] == [(row["image"], row.get("caption")) for row in plain]

    for suffix in (".csv", ".html"):
        assert clipcap(*run, "--duplicates", "0.9999", "--output", tmp_path / f"e{suffix}") == 0
    with (tmp_path / "e.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {row["image"]: row["duplicate_of"] for row in lines if row["duplicate_of"]} == firsts
    assert [row["image"] for row in lines] == [row["image"] for row in plain]
    assert (tmp_path / "e.html").read_text().count(f", nearly {photos}/03.png</span>") >= 2


def break_some(folder: Path, picture: bytes) -> list[str]:
    """200 pictures, of which some are broken, each differently; the names of these."""
    for number in range(200):
        (folder / f"{number:03}.png").write_bytes(picture)
    (folder / "020.png").write_bytes(picture[: len(picture) // 2])
    (folder / "040.png").write_bytes(b"")
    (folder / "060.png").write_text("no picture")
    (folder / "080.png").write_bytes(bytes(100))
    (folder / "100.png").unlink()
    (folder / "100.png").mkdir()
    return [f"{number:03}.png" for number in (20, 40, 60, 80, 100)]


def test_a_job_that_is_killed_goes_on(pixels_run: Path, source: Source, tmp_path: Path) -> None:
    """Twice: in the end each picture has one line, in order, and what was done was not done again."""
    folder, output = tmp_path / "photos", tmp_path / "captions.jsonl"
    folder.mkdir()
    broken = break_some(folder, (source.pictures / "01.png").read_bytes())
    partial = tmp_path / "captions.jsonl.partial"
    names = "".join(f"{folder / f'{number:03}.png'}\n" for number in range(200))
    (tmp_path / "list").write_text(names)
    command = ["-m", "clipcap_jax", "caption", pixels_run, f"@{tmp_path / 'list'}", "--output", output]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "1"}

    def start() -> subprocess.Popen[str]:
        arguments = [sys.executable, *map(str, command), "--batch-size", "2"]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)

    kept: list[bytes] = []
    for enough in (20, 90):
        process = start()
        while not partial.exists() or partial.read_bytes().count(b"\n") <= enough:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        lines = partial.read_bytes().splitlines(keepends=True)
        assert lines[: len(kept)] == kept
        kept = [line for line in lines if line.endswith(b"\n")]
        assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"image": "half of a li')
    process = start()
    told = process.communicate()[1]
    assert process.returncode == 0
    assert f"Going on after {len(kept) - 1} of 200 pictures" in told
    assert "195 captions, 5 pictures skipped" in told
    rows = rows_of(output)
    assert [row["image"] for row in rows] == names.splitlines()
    assert [Path(row["image"]).name for row in rows if "error" in row] == broken
    done = list(outputs._lines(map(json.loads, kept[1:])))
    assert rows[: len(done)] == done
    assert len(kept) < 200


def test_several_captions_of_each_picture(
    clipcap: Clipcap, pixels_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line each, wherever they go."""
    run = ("caption", pixels_run, photos, "--n", "3", "--prompt", "a", "--max-tokens", "6")
    assert clipcap(*run) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert f"{3 * PICTURES} captions, 1 picture skipped" in printed.err
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row["image"], []).extend([row["caption"]] if "caption" in row else [])
    captioner = Captioner.load(pixels_run)
    for image in list(captions)[:2]:
        best = captioner.caption(image, n=3, prompt="a", max_tokens=6)
        assert captions[image] == [caption.text for caption in best]
    assert all(len({*texts}) == 3 for image, texts in captions.items() if "broken" not in image)
    assert all(text.startswith("a") for texts in captions.values() for text in texts)
    assert clipcap(*run, "--output", tmp_path / "c.csv") == 0
    with (tmp_path / "c.csv").open(newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == [row.get("caption", "") for row in rows]
    assert clipcap(*run, "--output", tmp_path / "c.html") == 0
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png") == PICTURES
    assert page.count('class="caption"') == 3 * PICTURES
    assert clipcap(*run, "--sidecar", ".txt") == 0
    assert (photos / "05.txt").read_text().splitlines() == captions[str(photos / "05.png")]
    drawn = ("caption", pixels_run, photos, "--temperature", "3", "--sidecar", ".drawn")
    assert clipcap(*drawn) == 0
    text = (photos / "05.drawn").read_text()
    (photos / "05.drawn").unlink()
    assert clipcap(*drawn, "--existing", "skip") == 0
    assert (photos / "05.drawn").read_text() == text  # as of the sixth picture, not of the first
    assert clipcap(*run, "--output", tmp_path / "c.json") == 2
    assert clipcap("score", tmp_path / "c.csv", tmp_path / "c.csv") == 2
    assert "images with more than one caption" in capsys.readouterr().err


def test_what_is_drawn_goes_on(
    clipcap: Clipcap, embeddings_run: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had never stopped, and without a seed too."""
    output = tmp_path / "c.jsonl"
    run = ("caption", embeddings_run, source.embeddings, "--temperature", "3", "--batch-size", "4", "--output", output)
    assert clipcap(*run) == 0
    whole = rows_of(output)
    assert len({row["caption"] for row in whole}) > 10
    captioner = Captioner.load(embeddings_run)
    drawn = captioner.caption(np.load(source.embeddings), temperature=3.0, seed=0)
    assert [row["caption"] for row in whole] == [caption.text for caption in drawn]
    assert clipcap(*run, "--overwrite", "--seed", "1") == 0
    assert rows_of(output) != whole
    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_shared", interrupted_after(7))
        assert clipcap(*run) == 130
    assert clipcap(*run) == 0
    assert rows_of(output) == whole


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
    np.save(tmp_path / "single.npy", 1.0)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    full = tmp_path / "full.jsonl"
    (tmp_path / "full.jsonl.partial").symlink_to("/dev/full")
    for arguments, message in (
        (("caption", tmp_path / "no run", picture), "holds no checkpoints"),
        (("caption", pixels_run, picture, "--checkpoint", "77"), "there is no checkpoint '77'"),
        (("caption", pixels_run, tmp_path / "gone.jpg"), "there is no file, folder or glob"),
        (
            ("caption", pixels_run, picture, "--output", "captions.txt"),
            "has to end in .jsonl, .csv, .json, .pa",
        ),
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
        (("caption", pixels_run, picture, "--existing", "skip"), "give that too"),
        (("caption", pixels_run, picture, "--sidecar", ".txt", "--output", "c.csv"), "this names a folder"),
        (("caption", pixels_run, picture, "--duplicates", "0.9"), "--duplicates is of a file: name it with --output"),
        (("caption", pixels_run, picture, "--best-first", "--sidecar", ".txt"), "--best-first is of a file"),
        (("caption", pixels_run, picture, "--duplicates", "1.5", "--output", "c.csv"), "1.5 is not a number above 0"),
        (("caption", pixels_run, picture, "--duplicates", "x", "--output", "c.csv"), "invalid cosine value: 'x'"),
        (("caption", pixels_run, picture, "--duplicates", "0.9", "--output", "c.json"), "no place for duplicates"),
        (("caption", pixels_run, picture, "--sidecar", ".JPG"), "a suffix such as .txt is needed"),
        (("caption", pixels_run, picture, "--sidecar", "/../x"), "a suffix such as .txt is needed"),
        (("caption", embeddings_run, source.embeddings, "--sidecar", ".txt"), "is for pictures"),
        (("caption", embeddings_run, source.embeddings, "--output", "x.html"), "a page shows pictures"),
        (("caption", pixels_run, f"@{tmp_path / 'gone.txt'}"), "gone.txt cannot be read: No such file"),
        (("caption", embeddings_run, tmp_path / "single.npy"), "holds a single number"),
        (("caption", embeddings_run, tmp_path / "text.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "flat.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "objects.npy"), "is not a NumPy matrix"),
        (("caption", embeddings_run, tmp_path / "gone.npy"), "No such file"),
        (("caption", pixels_run, picture, "--batch-size", "0"), "--batch-size"),
        (("caption", pixels_run, picture, "--beam-size", "0"), "--beam-size"),
        (("caption", pixels_run, picture, "--beam-size", "401"), "401"),
    ):
        assert clipcap(*arguments) == 2, arguments
        printed = capsys.readouterr()
        assert message in printed.err.replace("\n", " "), arguments
        assert "Traceback" not in printed.err
