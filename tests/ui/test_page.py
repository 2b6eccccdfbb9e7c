"""The page as gradio serves it: through gradio's own client, and in a headless browser where one is installed.

`.ci/run` puts gradio and playwright into a folder of their own, since gradio needs an older Pillow.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install --target DIR gradio, and PYTHONPATH=DIR")

from dit_accel.ui.page import build_page, serve  # noqa: E402
from dit_accel.ui.studio import Studio  # noqa: E402
from tests.browser import WIDTHS, Visit, chromium  # noqa: E402
from tests.ui.models import SETTINGS, images, videos  # noqa: E402

# In the order of the form: width, height, frames, steps, seed, recipe, density, dense.
SMALL = ("64", "64", "5", "3", "0", "pooled", "0.5", True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Served:
    """A page that is served on this machine."""

    def __init__(self, make: Callable[[], Any], folder: Path, settings: Any = None) -> None:
        self.page = build_page(Studio(make(), folder), "tiny", "a model of a moment", settings)
        self.address = serve(self.page, "127.0.0.1", free_port(), open_browser=False, block=False)


@pytest.fixture(scope="module", params=["videos", "images"])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    make, settings = {"videos": (videos, SETTINGS), "images": (images, None)}[request.param]
    one = Served(make, tmp_path_factory.mktemp("results"), settings)
    yield one
    one.page.close()


@pytest.fixture(scope="module")
def of_videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(videos, tmp_path_factory.mktemp("results"), SETTINGS)
    yield one
    one.page.close()


def test_two_clients_get_what_they_asked_for(of_videos: Served) -> None:
    from gradio_client import Client

    clients = [Client(of_videos.address, verbose=False) for _ in range(2)]
    jobs = [
        client.submit(prompt, *SMALL, api_name="/generate")
        for client, prompt in zip(clients, ("a ghost", "two stars"), strict=True)
    ]
    files = []
    for job in jobs:
        status, dense, fast, verdict, picture, summary = job.result(timeout=120)
        assert "Done." in status
        assert "Ratio" in verdict
        assert "<svg" in picture
        assert "recipe: pooled; select.density=0.5" in summary
        assert len([one for one in job.outputs() if "step" in one[0]]) == 6, "each step of both sides"
        files.append([Path(one).read_bytes() for one in (dense, fast)])
    assert files[0][0] != files[1][0]


def test_a_client_cancels_its_own_job(of_videos: Served) -> None:
    from gradio_client import Client

    client, other = (Client(of_videos.address, verbose=False) for _ in range(2))
    job = client.submit("a ghost", "64", "64", "5", "400", *SMALL[4:], api_name="/generate")
    until(lambda: any("step 1" in one[0] for one in job.outputs()))
    other.predict(api_name="/cancel")
    time.sleep(0.3)
    assert not job.done()
    client.predict(api_name="/cancel")
    assert "Cancelled." in job.result(timeout=60)[0]


def test_an_error_is_a_sentence(of_videos: Served) -> None:
    from gradio_client import Client

    found = Client(of_videos.address, verbose=False).predict("<b>", "65", *SMALL[1:], api_name="/generate")
    assert found[0] == (
        '<div class="failed" role="alert">Error: WanPipeline needs a width that is a multiple of 16, got 65.</div>'
    )


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


class VisitToPage(Visit):
    """And what its status said, also what was gone before anybody could look."""

    def __init__(self, browser: Any, address: str, width: int = 1400) -> None:
        super().__init__(browser, address, width)
        self.page.wait_for_selector("#generate")
        self.page.evaluate(
            "window.said = []; new MutationObserver(() => said.push(document.querySelector('#status').innerText))"
            ".observe(document.querySelector('#status'), {childList: true, subtree: true, characterData: true})"
        )

    def fill(self, **fields: str) -> None:
        for label, value in fields.items():
            self.page.get_by_label(label, exact=True).fill(value)

    def wait_for(self, text: str) -> None:
        self.page.wait_for_function("text => said.some(one => one.includes(text))", arg=text)

    def wait_for_step(self, at_least: int) -> None:
        """Every step is shown, but two that come at once may be shown as one."""
        self.page.wait_for_function(
            "step => said.some(one => step <= Number((one.match(/step (\\d+) of/) || [0, 0])[1]))", arg=at_least
        )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_in_a_browser(width: int, served: Served, browser: Any) -> None:
    visit = VisitToPage(browser, served.address, width)
    assert not visit.overflows()
    visit.fill(Prompt="a ghost", Steps="3")
    if served.page.title == "dit_accel: tiny" and visit.page.get_by_label("Frames").is_visible():
        kind = "video"
    else:
        kind = "img"
        visit.fill(Width="40", Height="24")
    visit.page.click("#generate")
    visit.wait_for_step(1)
    visit.wait_for("Done.")
    for side in ("#dense", "#accelerated"):
        visit.page.wait_for_selector(f"{side} {kind}")
    if kind == "video":
        visit.play(2)
    else:
        visit.page.wait_for_function(
            "[...document.querySelectorAll('#dense img')].every(one => one.naturalWidth == 40)"
        )
    assert "Accelerated:" in visit.page.inner_text("#verdict")
    assert visit.page.locator("#steps svg rect[class]").count() == 3
    assert "attention:" in visit.page.inner_text("#summary")
    assert not visit.overflows()
    assert visit.complaints == []


def test_an_error_and_a_cancel_in_a_browser(of_videos: Served, browser: Any) -> None:
    visit = VisitToPage(browser, of_videos.address)
    visit.page.click("#generate")
    visit.wait_for("Error: The prompt is empty: say what to generate.")
    visit.fill(Prompt="a ghost", Steps="400")
    visit.page.click("#generate")
    visit.wait_for_step(1)
    visit.page.click("#cancel")
    visit.wait_for("Cancelled.")
    visit.fill(Steps="2")
    visit.page.click("#generate")
    visit.wait_for("Done.")
    assert visit.complaints == []


def test_two_browsers_at_once(of_videos: Served, browser: Any) -> None:
    """The second waits its turn; cancelling the first does not touch it."""
    first, second = (VisitToPage(browser, of_videos.address) for _ in range(2))
    first.fill(Prompt="a ghost", Steps="400")
    first.page.click("#generate")
    first.wait_for_step(1)
    second.fill(Prompt="two yellow stars", Steps="3")
    second.page.click("#generate")
    first.wait_for_step(3)
    assert "Done" not in second.page.inner_text("#status")
    first.page.click("#cancel")
    first.wait_for("Cancelled.")
    second.wait_for("Done.")
    assert "Cancelled." in first.page.inner_text("#status")
    assert second.page.locator("#steps svg rect[class]").count() == 3
    assert first.complaints == second.complaints == []
