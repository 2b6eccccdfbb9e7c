"""The report's page as a visitor sees it, on a screen and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit_accel.quality.report import write_report
from tests.browser import WIDTHS, Visit, chromium
from tests.quality.test_report import small_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("report")
    report = small_report(folder, frames=8)
    # A name as long as they come.
    long = "pooled;select.density=0.123456;schedule.dense_fraction=0.1"
    results = tuple(replace(one, recipe=long) if one.recipe == "rough" else one for one in report.results)
    return write_report(replace(report, results=results, recipes=("exact", long)), folder).page.as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_films_play_and_nothing_is_complained_of(width: int, address: str, browser: Any) -> None:
    visit = Visit(browser, address, width)
    assert not visit.overflows()
    visit.play(6)
    visit.page.click("#play")
    assert visit.page.inner_text("#play") == "Play"
    visit.page.wait_for_function("[...document.querySelectorAll('video')].every(one => one.paused)")
    assert visit.complaints == []
    visit.close()


# Right edges of the cells of a table's rows, by column.
EDGES = """[...document.querySelectorAll('.scroll')].map(box => [...box.querySelectorAll('thead th')].map(
    one => one.getBoundingClientRect().right - box.getBoundingClientRect().right))"""


def test_tables_fit_a_screen(address: str, browser: Any) -> None:
    visit = Visit(browser, address, WIDTHS[0])
    cost, fidelity, *_ = visit.page.evaluate(EDGES)
    assert max(*cost, *fidelity) <= 0
    visit.close()


def test_a_phone_shows_time_and_speed_up_at_once_and_that_there_is_more(address: str, browser: Any) -> None:
    visit = Visit(browser, address, WIDTHS[1])
    heads = visit.page.locator(".scroll").first.locator("th").all_inner_texts()
    assert heads[1:3] == ["Time, s", "Speed-up"]
    cost = visit.page.evaluate(EDGES)[0]
    assert cost[2] <= 0
    assert cost[-1] > 0, "else nothing would have to be hinted at"
    # The shade, of which a table without more to scroll to covers what it may.
    background = visit.page.evaluate("getComputedStyle(document.querySelector('.scroll')).backgroundAttachment")
    assert background == "local, scroll"
    visit.close()
