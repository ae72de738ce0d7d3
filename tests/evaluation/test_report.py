import base64
import dataclasses
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

from clipcap_jax import pictures
from clipcap_jax.evaluation import report
from clipcap_jax.metrics import Scores
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.progress import screen


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
    picture: str = "",
    finished: bool = True,
) -> report.Row:
    scores = {"CIDEr": score, "Bleu_4": 1 / (1 + score)}
    return report.Row(image_id, caption, references, scores, lambda: image, image_path, picture, finished)


def make_scorecard(rows: Sequence[report.Row]) -> Scorecard:
    scores = Scores(
        tuple(row.image_id for row in rows),
        {name: mean([row.scores[name] for row in rows]) for name in ("Bleu_4", "CIDEr")},
        {"METEOR": "no [java] was found"},
    )
    return Scorecard(scores, domains={}, health={"distinct captions": 2}, details={"checkpoint": "runs/flickr8k"})


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


def write(path: Path, rows: Sequence[report.Row], pictures: int = 1000) -> Page:
    scorecard = make_scorecard(rows)
    report.write_page(path, title="flickr8k, test split", rows=rows, scorecard=scorecard, pictures=pictures)
    return Page(path.read_text(encoding="utf-8"))


def test_page_shows_everything_it_was_given(tmp_path: Path) -> None:
    rows = [
        make_row(caption="two dogs", references=("dogs", "a pair of dogs"), score=0.5),
        make_row("2", "", finished=False, score=0.25),
    ]
    page = write(tmp_path / "new" / "page.html", rows)
    for text in [
        "flickr8k, test split",
        "CIDEr",
        "0.3750",
        "Bleu_4",
        "METEOR",
        "not computed: no [java] was found",
        "95% interval",
    ]:
        assert text in page.texts
    for text in ["checkpoint", "runs/flickr8k", "two dogs", "dogs", "a pair of dogs", "(empty)", "not finished"]:
        assert text in page.texts
    assert "CIDEr 0.50" in page.texts
    assert "Bleu_4 0.67" in page.texts
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
    assert len(links) == 1
    assert all(link and link.startswith("data:image/") for link in links)


def test_best_come_first_and_carry_their_scores(tmp_path: Path) -> None:
    scores = [3, 1, 4, 1.5, 9, 2.6, 5]
    page = write(tmp_path / "page.html", [make_row(f"id{score}", score=score) for score in scores])
    assert [text for text in page.texts if text.startswith("id")] == [f"id{score}" for score in sorted(scores)[::-1]]
    # What the page's script sorts by: in the order of the choices.
    [cards] = [[tag for name, tag in page.tags if name == "figure"]]
    assert [card["data-scores"] for card in cards[:2]] == ["0.1 9 ", f"{1 / 6} 5 "]
    assert [text for text in page.texts if text in ("CIDEr", "Bleu_4")][2:] == ["Bleu_4", "CIDEr"]


@pytest.mark.parametrize(("count", "pictures", "held"), [(0, 4, 0), (3, 4, 3), (7, 4, 4), (7, 3, 3), (7, 0, 0)])
def test_pictures_of_the_best_and_the_worst_are_held(tmp_path: Path, count: int, pictures: int, held: int) -> None:
    rows = [make_row(f"id{i}", score=i, image_path=f"photos/{i}.jpg") for i in range(count or 1)][: count or None]
    page = write(tmp_path / "page.html", rows if count else [make_row()], pictures if count else 0)
    assert len(page.pictures()) == held
    if count > pictures:
        middle = [f"photos/{i}.jpg" for i in range(pictures // 2, count - (pictures - pictures // 2))]
        assert [text for text in page.texts if text.startswith("photos")] == middle[::-1]


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
    write(tmp_path / "page.html", [make_row(f"id{index}", image=photo) for index in range(50)], pictures=10)
    assert (tmp_path / "page.html").stat().st_size < 10 * 150_000


def test_pictures_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(DRAWING)
    page = write(tmp_path / "page.html", [make_row(image=None, image_path=str(tmp_path / "cat.png"))])
    assert len(page.pictures()) == 1


def test_another_picture_under_the_same_name_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(DRAWING)
    rows = [
        make_row("1", image=None, image_path=str(path), picture=pictures.digest(DRAWING)),
        make_row("2", image=None, image_path=str(path), picture=pictures.digest(b"a dog")),
    ]
    page = write(tmp_path / "page.html", rows)
    assert len(page.pictures()) == 1
    assert f"{path} is another picture than it was when the data set was prepared" in page.texts


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
    assert any(text.startswith("photos/broken.jpg: The image is truncated or broken") for text in page.texts)
    assert any(text.startswith("4: Not an image") for text in page.texts)


def test_where_no_picture_was_given_nothing_stands_for_one(tmp_path: Path) -> None:
    for count, named in ((3, 0), (2000, 0), (2000, 1)):
        rows = [make_row(str(row), image=None) for row in range(count - named)]
        rows += [make_row("named", image=None, score=9.0, image_path="photos/gone.jpg")] * named
        write(tmp_path / "page.html", rows)
        page = (tmp_path / "page.html").read_text()
        assert page.count('class="missing"') == (1001 if named else 0)
        assert page.count("<figure") == count


def test_terminal_tables() -> None:
    console = screen(width=100, record=True, file=io.StringIO())
    rows = [make_row("id1", "a [red] cat", score=1.234), make_row("id2", references=(), score=0.234)]
    report.print_scores(make_scorecard(rows), console)
    console.print(report.captions_table(rows))
    text = console.export_text()
    for part in ["CIDEr", "0.7340", "METEOR", "no [java] was found", "id1", "1.23", "a [red] cat", "a cat on a mat"]:
        assert part in text


def test_no_number_is_cut_off() -> None:
    """On a narrow screen, as a pipe is too."""
    console = Console(width=40, record=True, file=io.StringIO())
    rows = [make_row("id1", score=1.234), make_row("id2", score=0.234)]
    scorecard = make_scorecard(rows)
    scorecard = dataclasses.replace(scorecard, domains=dict.fromkeys(["near-domain", "out-domain"], scorecard.scores))
    report.print_scores(scorecard, console)
    lines = console.export_text().splitlines()
    assert ["metric", "score", "95%", "interval", "near-domain", "out-domain"] in [line.split() for line in lines]
    assert ["CIDEr", "0.7340", "0.2340-1.2340", "0.7340", "0.7340"] in [line.split() for line in lines]
