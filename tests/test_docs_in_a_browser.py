"""Every page of the built docs site, on a screen and on a phone: `.ci/run` names the folder in `DIT_ACCEL_SITE`."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import WIDTHS, Visit, chromium

SITE = os.environ.get("DIT_ACCEL_SITE")
if not SITE:
    pytest.skip("needs the built site: mkdocs build --site-dir DIR, and DIT_ACCEL_SITE=DIR", allow_module_level=True)
PAGES = sorted(path.name for path in Path(SITE).glob("*.html"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module", params=WIDTHS)
def visit(request: Any, address: str) -> Iterator[Visit]:
    """One visitor for all pages, whose browser keeps what they share."""
    with chromium() as browser:
        yield Visit(browser, f"{address}/index.html", request.param)


def test_there_are_pages() -> None:
    assert {"index.html", "quickstart.html", "comfyui.html", "api.html"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, visit: Visit, address: str) -> None:
    visit.complaints.clear()
    visit.page.goto(f"{address}/{page}")
    pictures = "[...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.src)"
    assert visit.page.evaluate(pictures) == []
    assert not visit.overflows()
    assert visit.page.locator("h1").count() == 1 or page == "404.html"
    assert visit.complaints == []
