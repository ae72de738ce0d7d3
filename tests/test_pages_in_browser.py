"""The pages as Chromium shows them, on a phone and on a desk, and what axe finds that not everybody can use."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from PIL import Image

from clipcap_jax import pages as pages_lib
from clipcap_jax.captioning.captioner import Caption
from clipcap_jax.captioning.insight import Word
from clipcap_jax.commands import outputs
from clipcap_jax.datasets.page import write_page as write_data_set
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.evaluation import report
from clipcap_jax.metrics import References, score_domains
from clipcap_jax.metrics.scorecard import Scorecard

needs.skip_without("chromium", "playwright", "axe_playwright_python")
pytestmark = pytest.mark.slow

LONG = "a_name_that_goes_on_and_on_and_on_without_any_space_where_a_line_could_be_broken"
REFERENCES = {f"{i}": (f"a dog on bench {i}", "an animal") for i in range(6)}
CAPTIONS = {f"{i}": f"a dog on bench {i}" if i % 2 else f"a cat {LONG}" for i in range(6)}
DOMAINS = dict(zip(CAPTIONS, ("in-domain", "near-domain", "out-of-domain") * 2, strict=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each kind."""
    folder, drawn = tmp_path_factory.mktemp("pages"), io.BytesIO()
    Image.new("RGB", (300, 200)).save(drawn, "PNG")
    scores = References(REFERENCES).score(CAPTIONS)
    domains = score_domains(REFERENCES, CAPTIONS, DOMAINS, scores)
    scorecard = Scorecard(scores, domains, {}, {"data set": LONG}, paper="nocaps", baseline=scores)
    for name, image in (("page", drawn.getvalue()), ("bare", None)):
        rows = [
            report.Row(
                f"{LONG}{i}",
                CAPTIONS[i],
                REFERENCES[i],
                {metric: values[i] for metric, values in scores.per_image.items()},
                lambda image=image: image,  # type: ignore[misc]
                "",
                "",
                i != "3",
            )
            for i in CAPTIONS
        ]
        report.write_page(folder / f"{name}.html", title=f"Captions of {LONG}", rows=rows, scorecard=scorecard)
    (folder / "1.png").write_bytes(drawn.getvalue())
    made: list[dict[str, Any]] = [
        {"image": LONG, "captions": [{"caption": "a dog", "score": -1.0, "finished": False}] * 2},
        {"image": "2", "error": "broken"},
    ]
    outputs.write(folder / "captions.html", iter(made), [folder / "1.png"] * 2)
    summary = Summary(LONG, "there", {"train": 118_287}, {"train": 591_753}, {2: 9, 50: 1}, {LONG: 3}, (), (LONG,), {})
    sample = Example(drawn.getvalue(), None, "", LONG, ("a dog", LONG), "near-domain")
    shown, words = pages_lib.picture(drawn.getvalue(), "", ""), [[Word(f" {LONG[:12]}", i / 9) for i in range(5)]] * 3
    found = Caption("a dog", False, -1.0)
    pages_lib.write(folder / "prefix.html", "prefix.html", title=LONG, shown=shown, caption=found, words=words)
    write_data_set(folder / "dataset.html", summary, "", {"train": [sample]})
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["page", "bare", "captions", "dataset", "prefix"])
def test_pages_fit_and_can_be_used(name: str, width: int, scheme: str, browser: Any, pages: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    # axe is put into the page, which its policy forbids.
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True)
    page.goto((pages / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    faults = Axe().run(page).response["violations"]
    assert not [(fault["id"], fault["nodes"][0]["html"]) for fault in faults]
    page.close()


def test_a_wide_table_scrolls_in_its_box(browser: Any, pages: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((pages / "page.html").as_uri())
    box = page.get_by_role("region", name="scores", exact=True)
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("box => box.scrollLeft > 0", arg=box.element_handle())
    page.close()


def test_sort_and_search(browser: Any, pages: Path) -> None:
    page, told = browser.new_page(), []
    page.on("console", lambda message: told.append(message.text))  # of scripts that the page's policy forbids
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto((pages / "page.html").as_uri())
    first = page.locator("#cards .caption").first
    assert first.text_content().startswith("a dog")
    page.get_by_label("order").select_option("worst first")
    assert first.text_content().startswith("a cat")
    page.get_by_role("searchbox").fill("BENCH 3")
    assert page.locator("#count").inner_text() == "1"
    assert page.locator("#cards figure:visible .caption").all_text_contents() == ["a dog on bench 3 not finished"]
    assert not told
    page.close()
