"""A real browser for pages that are opened from disk. An error in one is an error here."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@contextmanager
def launched() -> Iterator[Any]:
    """Chromium without a window, with a new profile."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_file(
    browser: Any, path: Path, address: str = "", width: int = 1200, scheme: str = "light"
) -> Any:
    """A page, with a list of its `problems`: errors, messages, requests to elsewhere."""
    viewport = {"width": width, "height": 800}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("request", lambda request: page.problems.extend(_elsewhere(request.url)))
    page.goto(path.as_uri() + address)
    return page


def _elsewhere(url: str) -> list[str]:
    return [] if url.startswith(("file:", "blob:", "data:")) else [url]


def close(page: Any) -> None:
    assert not page.problems, page.problems
    page.context.close()


def violations(page: Any) -> list[dict[str, Any]]:
    """What axe-core finds, of any impact."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # From disk, style sheets can't be loaded twice, and frames not be talked to.
    options = {"preload": False, "iframes": False}
    return axe.run(page, options=options).response["violations"]
