import base64
import html.parser
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from clipcap_jax import report


def encoded_picture(width: int, height: int, kind: str, mode: str = "RGB") -> bytes:
    """A picture of noise, which compresses worst."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


DRAWING = encoded_picture(64, 64, "PNG")


def make_row(
    image_id: str = "1",
    caption: str = "a cat",
    references: tuple[str, ...] = ("a cat on a mat",),
    score: float = 1.0,
    image: bytes | None = DRAWING,
    image_path: str = "",
    finished: bool = True,
) -> report.Row:
    return report.Row(image_id, caption, references, score, image, image_path, finished)


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text outside style and script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.code = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.code = False

    def handle_data(self, data: str) -> None:
        if not self.code and data.strip():
            self.texts.append(data.strip())

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def write(path: Path, rows: Sequence[report.Row], shown: int = 50) -> Page:
    report.write_page(
        path,
        title="flickr8k, test split",
        rows=rows,
        scores={"CIDEr": 0.50612, "BLEU-4": 0.193},
        not_computed={"METEOR": "no Java runtime was found"},
        details={"checkpoint": "runs/flickr8k"},
        shown=shown,
    )
    return Page(path.read_text(encoding="utf-8"))


def test_page_shows_everything_it_was_given(tmp_path: Path) -> None:
    rows = [make_row(caption="two dogs", references=("dogs", "a pair of dogs")), make_row("2", "", finished=False)]
    page = write(tmp_path / "new" / "page.html", rows)
    for text in ["flickr8k, test split", "CIDEr", "0.5061", "BLEU-4", "0.1930", "METEOR", "no Java runtime was found"]:
        assert text in page.texts
    for text in ["checkpoint", "runs/flickr8k", "two dogs", "dogs", "a pair of dogs", "(empty)", "not finished"]:
        assert text in page.texts
    assert "1 of the captions reached the length limit before they ended" in page.texts


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text.strip() == text))
def test_untrusted_text_stays_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("page")
    plain = write(folder / "plain.html", [make_row(image=None, image_path="x")])
    hostile = f"{text}</p><script>alert(1)</script>\"'><img src=http://example.com/x onerror=alert(1)>{{{{ 1 + 1 }}}}"
    page = write(folder / "page.html", [make_row(hostile, hostile, (hostile,), image=None, image_path=f"x{hostile}")])
    assert page.tags == plain.tags
    assert page.texts.count(hostile) == 3
    assert f"There is no picture at x{hostile}" in page.texts


def test_nothing_outside_the_file_is_referred_to(tmp_path: Path) -> None:
    write(tmp_path / "page.html", [make_row(), make_row("2", image=None, image_path="gone.jpg")])
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//|@import|<link|url\(", re.sub(r"base64,[^\"]*", "", source))
    links = [value for _, tag in Page(source).tags for name, value in tag.items() if name in ("src", "href")]
    assert len(links) == 3
    assert all(link and link.startswith(("data:image/", "#")) for link in links)


def test_best_come_first_and_worst_from_the_bottom(tmp_path: Path) -> None:
    scores = [3, 1, 4, 1.5, 9, 2.6, 5]
    page = write(tmp_path / "page.html", [make_row(f"id{score}", score=score) for score in scores], shown=2)
    assert [text for text in page.texts if text.startswith("id")] == ["id9", "id5", "id1", "id1.5"]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_no_picture_is_shown_twice(tmp_path: Path, count: int) -> None:
    page = write(tmp_path / "page.html", [make_row(f"id{index}", score=index) for index in range(count)], shown=3)
    ids = [text for text in page.texts if text.startswith("id")]
    assert sorted(ids) == [f"id{index}" for index in range(count)]


def test_small_drawings_are_kept_exact(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", [make_row()])
    [picture] = page.pictures()
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(DRAWING))))
    assert [tag["class"] for name, tag in page.tags if name == "img"] == ["drawing"]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_photos_are_shrunk(tmp_path: Path, mode: str) -> None:
    photo = encoded_picture(3000, 2000, "JPEG", mode)
    [picture] = write(tmp_path / "page.html", [make_row(image=photo)]).pictures()
    assert picture.format == "JPEG"
    assert picture.mode == "RGB"
    assert picture.width == 320
    assert picture.height in (213, 214)


def test_size_is_bounded(tmp_path: Path) -> None:
    photo = encoded_picture(700, 700, "JPEG")
    write(tmp_path / "page.html", [make_row(f"id{index}", image=photo) for index in range(50)], shown=5)
    assert (tmp_path / "page.html").stat().st_size < 10 * 150_000


def test_pictures_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(DRAWING)
    page = write(tmp_path / "page.html", [make_row(image=None, image_path=str(tmp_path / "cat.png"))])
    assert len(page.pictures()) == 1


def test_missing_and_broken_pictures_are_named(tmp_path: Path) -> None:
    rows = [
        make_row("1", image=None, image_path="photos/gone.jpg"),
        make_row("2", image=None),
        make_row("3", image=encoded_picture(300, 300, "JPEG")[:500], image_path="photos/broken.jpg"),
        make_row("4", image=b"not a picture"),
    ]
    page = write(tmp_path / "page.html", rows)
    assert not page.pictures()
    assert "There is no picture at photos/gone.jpg" in page.texts
    assert "This data set holds no pictures." in page.texts
    assert any(text.startswith("photos/broken.jpg: The image is truncated or broken") for text in page.texts)
    assert any(text.startswith("4: Not an image") for text in page.texts)


def test_terminal_tables() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.scores_table({"CIDEr": 0.50612}, {"METEOR": "no [java] was found"}))
    console.print(report.captions_table([make_row("id1", "a [red] cat", score=1.234), make_row("id2", references=())]))
    text = console.export_text()
    for part in ["CIDEr", "0.5061", "METEOR", "no [java] was found", "id1", "1.23", "a [red] cat", "a cat on a mat"]:
        assert part in text
