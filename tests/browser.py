"""A headless browser, where one is installed; `.ci/run` brings playwright in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A machine without a way out would fill the console with what the browser itself asks for.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A screen, and a phone.
WIDTHS = (1400, 400)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; the test is skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install --target DIR playwright, and PYTHONPATH=DIR"
    )
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield one
        one.close()


class Visit:
    """A visitor's page, with what its console said, what it failed to load, and what it asked of other machines."""

    def __init__(self, browser: Any, address: str, width: int = WIDTHS[0]) -> None:
        self.complaints: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.on("console", lambda one: self.complaints.append(one.text) if one.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", self._fail)
        self.page.on("request", self._look)
        self.page.set_default_timeout(20_000)
        self.page.goto(address)

    def _fail(self, request: Any) -> None:
        # What leaving a page breaks off is no fault, nor is the end of a stream of gradio's.
        if request.failure != "net::ERR_ABORTED" and "/queue/data" not in request.url:
            self.complaints.append(request.url)

    def _look(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")):
            self.complaints.append(f"asked {request.url}")

    def overflows(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def play(self, number: int) -> None:
        """All films of the page, of which there must be so many; an error or a film that stands still times out."""
        loaded = "[...document.querySelectorAll('video')].every(one => !one.error && one.readyState > 1)"
        self.page.wait_for_function(f"document.querySelectorAll('video').length == {number} && {loaded}")
        self.page.evaluate("document.querySelectorAll('video').forEach(one => one.play())")
        self.page.wait_for_function("[...document.querySelectorAll('video')].every(one => one.currentTime > 0)")

    def close(self) -> None:
        self.page.context.close()
