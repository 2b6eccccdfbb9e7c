"""The written report: self-contained, escaped, complete, and a film that holds every clip."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.quality import ClipPair, Interval, Measurement, measure
from dit_accel.quality.bootstrap import range_of
from dit_accel.quality.clips import read_clip, save_clip, side_by_side
from dit_accel.quality.page import report_page
from dit_accel.quality.pixel import Psnr, Ssim
from dit_accel.quality.plot import ParetoPoint, pareto_svg
from dit_accel.quality.report import read_report, write_report
from dit_accel.quality.results import DENSE, ClipResult, ComparisonReport
from tests.quality.clips import moving_clip, with_noise

_PROMPTS = ("a green dragon", "a <script>alert('&')</script> whale")


def small_report(folder: Path, frames: int = 5) -> ComparisonReport:
    results = []
    for i, prompt in enumerate(_PROMPTS):
        clip = moving_clip(frames, 48, 65, speed=1.0 + i)
        dense = save_clip(clip, folder / "clips" / f"{i}-dense", 8)
        results.append(ClipResult(prompt, i, DENSE, 4.0, 3.0, 1.0, clip=str(dense.relative_to(folder))))
        for name, std in (("exact", 0.0), ("rough", 0.1)):
            candidate = with_noise(clip, std)
            metrics = {
                **measure(ClipPair(clip, candidate, 8), [Psnr(), Ssim()]),
                "lpips": Measurement(reason="LPIPS needs <weights>: pip install 'dit-accel[quality]'."),
            }
            path = save_clip(candidate, folder / "clips" / f"{i}-{name}", 8)
            seconds = 3.0 if name == "exact" else 1.5
            results.append(ClipResult(prompt, i, name, seconds, 1.0, 0.2, metrics, str(path.relative_to(folder))))
    facts = {"command": "dit-accel compare embedded", "device": "CPU"}
    return ComparisonReport("Tiny", tuple(results), ("exact", "rough"), {}, 8, facts, ("rough: <odd>",))


class _Tags(HTMLParser):
    """Collects start tags, and fails on unbalanced ones."""

    VOID = frozenset({"meta", "link", "br", "img", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    page = report_page(small_report(tmp_path), tmp_path)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    for tag, attributes in tags.seen:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in page
    assert not re.search(r"https?://|url\(", page)
    assert sum(tag == "video" for tag, _ in tags.seen) == 6
    assert sum(tag == "svg" for tag, _ in tags.seen) == 2
    assert sum(tag == "script" for tag, _ in tags.seen) == 1


def test_page_says_what_is_missing_and_shows_infinity(tmp_path: Path) -> None:
    page = report_page(small_report(tmp_path), tmp_path)
    assert "<li>LPIPS needs &lt;weights&gt;: pip install &#x27;dit-accel[quality]&#x27;." in page
    assert "rough: &lt;odd&gt;" in page
    assert "∞" in page
    assert "dit-accel compare embedded" in page
    assert "rough 2.67× (2.67× to 2.67×, over 2 runs), PSNR to dense" in page


def test_the_title_is_the_models_name(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    assert "<h1>Tiny: dense and accelerated</h1>" in report_page(report, tmp_path)
    page = report_page(replace(report, facts={**report.facts, "model": "org/<m>"}), tmp_path)
    assert "<h1>org/&lt;m&gt;: dense and accelerated</h1>" in page
    assert "<title>org/&lt;m&gt;: comparison</title>" in page
    assert "<dt>pipeline</dt><dd><code>Tiny</code></dd>" in page


def _timed(dense: tuple[float, ...], psnr: float = 40.0, **fast: tuple[float, ...]) -> ComparisonReport:
    """A report of these seconds, one clip a run."""
    times = {DENSE: dense, **fast}
    metrics = {"psnr": Measurement(value=psnr)}
    results = [
        ClipResult("a cat", seed, name, seconds, metrics={} if name == DENSE else metrics)
        for name, runs in times.items()
        for seed, seconds in enumerate(runs)
    ]
    return ComparisonReport("Tiny", tuple(results), tuple(fast))


def _lead(report: ComparisonReport) -> str:
    found = re.search(r'<p class="lead">(.*?)</p>', report_page(report, Path()))
    assert found is not None
    return found[1]


def test_the_lead_says_what_was_measured() -> None:
    """No recipe is called the fastest: its interval may hold 1, or its clips be far from dense."""
    lead = _lead(_timed((2.0, 2.2), 14.8, pooled=(2.1, 2.0)))
    assert "pooled 1.03× (0.93× to 1.13×, over 2 runs: no difference shown), PSNR to dense 14.8 dB" in lead
    lead = _lead(_timed((4.0, 4.4), 14.8, pooled=(2.0, 2.0), mass=(5.0, 5.5)))
    assert "pooled 2.10× (1.91× to 2.31×, over 2 runs), PSNR to dense 14.8 dB; mass 0.80× (0.73× to 0.88×" in lead
    assert "one run of each, no spread" in _lead(_timed((4.0,), pooled=(2.0,)))
    many = {f"r{n}": (4.0 - n / 2, 4.0 - n / 2) for n in range(5)}
    assert "5 recipes have median speed-ups from 1.00× to 2.00×, PSNR to dense from 40.0 to 40.0 dB" in _lead(
        _timed((4.0, 4.0), **many)
    )
    enough = _lead(_timed((4.0,) * 12, pooled=(2.0,) * 12))
    assert "pooled 2.00× (2.00× to 2.00×, 95% interval)" in enough
    for text in (lead, enough):
        assert "fastest" not in text
        assert "No recipe is faster" not in text


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "One clip, run once, has no spread"), (2, "the extremes of 2 clips"), (9, "the extremes of 9 clips")],
)
def test_few_clips_have_no_95_percent(count: int, said: str) -> None:
    page = report_page(_timed((4.0,) * count, pooled=(2.0,) * count), Path())
    assert said in page
    assert "95% bootstrap" not in page
    assert "95% interval over" not in page


def test_enough_clips_have_one() -> None:
    report = _timed((4.0,) * 12, pooled=(2.0,) * 12)
    assert "a 95% bootstrap interval over 12 clips" in report_page(report, Path())
    # Where a metric has a value on few of them, its cell says so.
    some = [
        r if r.seed < 3 or r.recipe == DENSE else replace(r, metrics={"psnr": Measurement(reason="none")})
        for r in report.results
    ]
    page = report_page(ComparisonReport("Tiny", tuple(some), ("pooled",)), Path())
    assert "40.00\N{NO-BREAK SPACE}– 40.00 (range of 3)" in page


def test_clips_beyond_the_limit_are_counted(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    page = report_page(report, tmp_path, embed_limit=0)
    assert "2 more prompts in the clips folder" in page
    assert "<video" not in page


def test_write_and_read(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    files = write_report(report, tmp_path)
    assert read_report(files.json) == report
    assert files.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert files.film is not None
    film = read_clip(files.film)
    assert film.shape[0] == 2 * 5
    # The panes are the clips: the dense one is drawn enlarged, so compare after shrinking it again.
    first = read_clip(tmp_path / "clips" / "0-dense.mp4")
    pane = film[0, 27 : 27 + 96, 8 : 8 + 132].double().numpy().reshape(48, 2, 66, 2, 3).mean((1, 3))
    assert np.abs(pane - first[0].double().numpy()).mean() < 8


def test_bad_report_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is not a comparison report"):
        read_report(path)


@pytest.mark.parametrize("text", [None, "[]", "1", '{"recipes": [[]]}', "\udcff"])
def test_what_is_no_report_is_one_sentence(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"report\.json is not a comparison report"):
        read_report(path)


@pytest.mark.parametrize("name", ["report.json", "index.html", "side_by_side.mp4"])
def test_a_report_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    report = small_report(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a folder"):
        write_report(report, tmp_path)


def test_a_film_that_cannot_be_encoded_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = small_report(tmp_path)
    old = write_report(report, tmp_path).film
    assert old is not None
    before = old.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_accel.pipelines.encode._encode", full)
    with pytest.raises(ValueError, match=r"Cannot write .*side_by_side\.mp4: No space left on device"):
        write_report(report, tmp_path)
    assert old.read_bytes() == before


def test_images_become_png(tmp_path: Path) -> None:
    files = write_report(small_report(tmp_path, frames=1), tmp_path)
    assert files.film is not None
    assert files.film.suffix == ".png"
    page = files.page.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6


def test_saved_clips_are_close_to_lossless(tmp_path: Path) -> None:
    clip = moving_clip(4, 63, 81)
    path = save_clip(clip, tmp_path / "a.b", 8)
    assert path.name == "a.b.mp4"
    back = read_clip(path)
    assert back.shape == (4, 64, 82, 3)
    assert Psnr()(ClipPair(clip, back[:, :63, :81])) > 30


def test_side_by_side_refuses_unequal_clips() -> None:
    with pytest.raises(ValueError, match="equally shaped clips"):
        side_by_side([torch.zeros(1, 8, 8, 3), torch.zeros(2, 8, 8, 3)], ["a", "b"], "")


def test_a_label_stays_over_its_own_clip() -> None:
    """Also one that is wider: the columns between two clips hold nothing, and the number at its end is kept."""
    clips = [torch.zeros(1, 40, 220, 3, dtype=torch.uint8)] * 2
    films = [
        side_by_side(clips, [f"{'pooled;select.density=0.1;' * 3}  {ratio}x", "mass  1.00x"], "").numpy()[0]
        for ratio in ("2.11", "2.77")
    ]
    head = films[0][:30]
    assert (head[:, 8 + 220 : 8 + 220 + 8] == head[0, 0]).all()
    assert (head[:, 150:228] != head[0, 0]).any()
    assert (films[0] != films[1]).any(), "the number is gone"
    short = side_by_side(clips, ["dense", "mass"], "").numpy()[0]
    assert (short[:30, 100:228] == short[0, 0]).all()


def _points(*values: tuple[float, float]) -> list[ParetoPoint]:
    return [ParetoPoint(f"r{i}", _interval(s), _interval(f), i) for i, (s, f) in enumerate(values)]


def _interval(low: float, high: float | None = None) -> Interval:
    return range_of([low, low if high is None else high])


@pytest.mark.parametrize(("higher", "fidelity"), [(True, (20, 30, 25)), (False, (0.3, 0.1, 0.2))])
def test_front_joins_what_nothing_beats(higher: bool, fidelity: tuple[float, float, float]) -> None:
    """The third recipe is slower and worse than the second."""
    points = _points((1, fidelity[0]), (2, fidelity[1]), (3, fidelity[2]))
    svg = pareto_svg(points, label="x", higher_is_better=higher, dense_seconds=4, digits=2)
    front = re.search(r'class="front" points="([^"]*)"', svg)
    assert front is not None
    pairs = [tuple(map(float, pair.split(","))) for pair in front[1].split()]
    assert len(pairs) == 2
    # Better is up: SVG's y falls.
    assert pairs[1][0] > pairs[0][0]
    assert pairs[1][1] < pairs[0][1]


def test_plot_without_finite_points_is_empty() -> None:
    points = _points((1, float("inf")))
    assert pareto_svg(points, label="x", higher_is_better=True, dense_seconds=4, digits=2) == ""


def test_plot_of_one_point_with_an_infinite_end() -> None:
    point = ParetoPoint("r", _interval(1), replace(_interval(29, 31), high=float("inf")), 0)
    svg = pareto_svg([point], label="x", higher_is_better=True, dense_seconds=2, digits=2)
    assert "nan" not in svg
    assert "inf" not in svg
