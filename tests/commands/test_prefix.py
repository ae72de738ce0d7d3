import re
from pathlib import Path

import pytest
from tiny import Clipcap, Source
from web import Web

from clipcap_jax.captioning.captioner import Captioner


def test_the_words_of_a_prefix(
    clipcap: Clipcap, pixels_run: Path, source: Source, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, page = source.pictures / "00.png", tmp_path / "new" / "prefix.html"
    assert clipcap("prefix", pixels_run, picture, "--output", page, "--words", "3") == 0
    printed = capsys.readouterr().out
    captioner = Captioner.load(pixels_run)
    caption, words = captioner.caption(picture), captioner.prefix_words(picture, 3)
    assert printed.startswith(f"{caption.text}\n")
    for row in words:
        assert ", ".join(f"{word.text!r} {word.similarity:.2f}" for word in row) in printed
    html = page.read_text(encoding="utf-8")
    assert f"<title>{picture.name}</title>" in html
    assert f'<p class="caption">{caption.text}</p>' in html
    assert html.count("data:image/png;base64,") == 1
    web.files["00.png"] = picture.read_bytes()
    there = tmp_path / "there.html"
    assert clipcap("prefix", pixels_run, web.url("00.png"), "--output", there, "--words", "3") == 0
    assert there.read_text(encoding="utf-8") == html
    shades = [int(share) for share in re.findall(r'class="word" style="--share: (\d+)%"', html)]
    assert shades == [int(f"{100 * max(word.similarity, 0):.0f}") for row in words for word in row]


def test_mistakes(
    clipcap: Clipcap,
    embeddings_run: Path,
    pixels_run: Path,
    source: Source,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = source.pictures / "00.png"
    (tmp_path / "x.html").write_text("")
    for arguments, message in (
        ((tmp_path / "gone", picture), "holds no checkpoints"),
        ((pixels_run, tmp_path / "gone.png"), "gone.png: cannot be read: No such file"),
        ((pixels_run, picture, "--output", "x.png"), "x.png: the name has to end in .html"),
        ((pixels_run, picture, "--output", tmp_path / "x.html"), "x.html is there already"),
        ((pixels_run, picture, "--output", tmp_path / "x.html" / "y.html"), "y.html cannot be written: "),
        ((pixels_run, picture, "--published", "coco-mlp"), "published: for the original's .pt files alone"),
        ((embeddings_run, picture), "not on pictures"),
    ):
        assert clipcap("prefix", *arguments) == 2
        assert message in capsys.readouterr().err
