"""A real browser for tests of pages: headless Chromium, which playwright drives."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def opened(address: str, *, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A page of playwright's at this address, in a window of so many pixels. It must ask for nothing elsewhere."""
    from playwright.sync_api import sync_playwright

    elsewhere = []

    def route(asked: Any) -> None:
        if asked.request.url.startswith((address, "data:", "blob:")):
            asked.continue_()
        else:
            elsewhere.append(asked.request.url)
            asked.abort()

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)  # a search may have to be compiled
            page.route("**/*", route)
            page.goto(address)
            yield page
        finally:
            browser.close()
    assert not elsewhere


def serious_faults(page: Any) -> list[str]:
    """What axe finds that keeps people from using the page: the rules, and where they are broken."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def tab_to(page: Any, element: Any, most: int = 60) -> None:
    """Press the tab key until the element has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if element.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{element} is not reached by the tab key")
