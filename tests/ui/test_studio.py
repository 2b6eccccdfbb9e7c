"""Jobs of the page, without the page: what is checked, what is shown, what is cancelled, and who waits for whom."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import imageio.v3 as iio
import numpy as np
import pytest

import dit_accel
from dit_accel.ui.studio import Shown, Studio
from dit_accel.ui.wanted import Form, Wanted, offered_recipes
from tests.ui.models import images, videos

FORM = Form("a ghost", width="64", height="64", frames="5", steps="3", recipe="pooled", density="0.5")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return videos()


@pytest.fixture
def studio(pipe: Any, tmp_path: Path) -> Studio:
    return Studio(pipe, tmp_path)


def is_clean(pipe: Any) -> bool:
    return not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_a_job_shows_each_step_and_then_both_sides(studio: Studio) -> None:
    shown = list(studio.run(FORM, "a"))
    said = [one.status for one in shown]
    steps = [f"Running {side}: step {step} of 3." for side in ("dense", "accelerated") for step in (1, 2, 3)]
    assert [one for one in said if "step" in one] == steps
    shares = [one.share for one in shown if one.share is not None]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert [one.dense is not None for one in shown if "accelerated" in one.status] == [True] * 4, "seen while waiting"
    last = shown[-1]
    assert last.status == "Done."
    assert last.dense is not None
    assert last.fast is not None
    assert last.dense != last.fast
    assert iio.imread(last.fast).shape == (5, 64, 64, 3)
    assert last.summary.startswith("recipe: pooled; select.density=0.5\n")
    assert "Ratio: " in last.verdict
    assert "without a warm-up" in last.verdict
    ElementTree.fromstring(last.picture)
    assert last.picture.count("<title>") == 3
    assert is_clean(studio.pipe)


def test_a_dense_result_serves_another_recipe(studio: Studio) -> None:
    first = list(studio.run(FORM, "a"))[-1]
    shown = list(studio.run(replace(FORM, recipe="fast", density=""), "a"))
    assert not any("dense" in one.status for one in shown)
    assert shown[-1].dense == first.dense
    again = list(studio.run(replace(FORM, seed="1"), "a"))
    assert any("Running dense" in one.status for one in again), "another seed is another clip"
    alone = list(studio.run(replace(FORM, with_dense=False), "a"))[-1]
    assert alone.dense is None
    assert "Ratio" not in alone.verdict


def test_a_run_that_stays_dense_is_the_dense_clip(studio: Studio) -> None:
    last = list(studio.run(replace(FORM, recipe="auto", density=""), "a"))[-1]
    assert last.dense is not None
    assert last.fast is not None
    assert "identical" in last.verdict, "the automatic recipe finds the clip too short to gain"
    assert last.fast.read_bytes() == last.dense.read_bytes()
    other = list(studio.run(replace(FORM, width="256", height="256", density="0.25", steps="2"), "a"))[-1]
    assert "a PSNR of " in other.verdict, "of several blocks some are left out"


def test_an_image_pipeline(tmp_path: Path) -> None:
    pipe = images()
    shown = list(Studio(pipe, tmp_path).run(Form("a cat", width="40", height="24", steps="2", frames="9"), "a"))
    last = shown[-1]
    assert last.status == "Done.", last.status
    assert last.fast is not None
    assert last.fast.suffix == ".png"
    assert iio.imread(last.fast).shape == (24, 40, 3)
    assert "Running dense: step 2 of 2." in [one.status for one in shown]


WRONG = {
    "prompt": ("  ", "The prompt is empty: say what to generate."),
    "width": ("65", "WanPipeline needs a width that is a multiple of 16, got 65."),
    "height": ("-16", "height must be a whole number from 1 on, got '-16'."),
    "frames": ("two", "frames must be a whole number from 1 on, got 'two'."),
    "steps": ("1001", "steps must be at most 1000, got 1001."),
    "seed": ("1.5", "seed must be a whole number from 0 on, got '1.5'."),
    "density": ("nan", "density must be a number in (0, 1], got 'nan'."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_a_sentence_before_anything_runs(
    name: str, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.ui.studio.generate", lambda *_, **__: pytest.fail("ran"))
    value, sentence = WRONG[name]
    (shown,) = studio.run(replace(FORM, **{name: value}), "a")
    assert (shown.status, shown.failed) == (f"Error: {sentence}", True)


def test_a_density_that_a_recipe_has_not(studio: Studio) -> None:
    (shown,) = studio.run(replace(FORM, recipe="sta"), "a")
    assert shown.failed
    assert "has no density to set, got '0.5'" in shown.status


def test_a_failure_in_the_run_is_a_sentence_and_leaves_a_clean_pipeline(studio: Studio) -> None:
    failing = studio.pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: _raise("no memory\nfor this"))
    try:
        shown = list(studio.run(FORM, "a"))
    finally:
        failing.remove()
    assert (shown[-1].status, shown[-1].failed) == ("Error: no memory", True)
    assert is_clean(studio.pipe)
    assert list(studio.run(FORM, "a"))[-1].status == "Done."


def _raise(text: str) -> None:
    raise RuntimeError(text)


def test_a_fault_of_the_program_is_not_hidden(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.ui.studio.save", lambda *_: {}["gone"])
    with pytest.raises(KeyError):
        list(studio.run(FORM, "a"))


def until(shown: Iterator[Shown], text: str) -> Shown:
    return next(one for one in shown if text in one.status)


@pytest.mark.parametrize("side", ["dense", "accelerated"])
def test_cancelled_at_the_next_step(side: str, studio: Studio) -> None:
    shown = studio.run(replace(FORM, steps="50"), "mine")
    until(shown, f"Running {side}: step 2")
    assert not studio.cancel("somebody else's")
    assert studio.cancel("mine")
    rest = list(shown)
    assert rest[-1] == Shown("Cancelled.")
    assert len(rest) <= 3, "a step was under way, and one may have begun"
    assert is_clean(studio.pipe)
    assert not studio.cancel("mine"), "it is over"


def test_a_visitor_who_goes_away_cancels(studio: Studio) -> None:
    shown = studio.run(replace(FORM, steps="50"), "mine")
    until(shown, "Running dense: step 1")
    shown.close()
    assert list(studio.run(FORM, "next"))[-1].status == "Done."


def test_two_visitors_do_not_disturb_each_other(studio: Studio) -> None:
    """Each gets what he gets alone, and the second waits."""
    forms = {"a": FORM, "b": replace(FORM, prompt="two yellow stars", seed="3")}
    alone = {name: list(studio.run(form, name))[-1] for name, form in forms.items()}
    both = Studio(studio.pipe, studio._folder / "both")
    found: dict[str, list[Shown]] = {}

    def visit(name: str) -> None:
        found[name] = list(both.run(forms[name], name))

    threads = [threading.Thread(target=visit, args=(name,)) for name in forms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited = [name for name, shown in found.items() if "Waiting" in shown[0].status]
    assert len(waited) == 1
    for name, wanted in alone.items():
        last = found[name][-1]
        for side in ("dense", "fast"):
            wanted_file, file = getattr(wanted, side), getattr(last, side)
            assert np.array_equal(iio.imread(wanted_file), iio.imread(file)), (name, side)
        assert last.picture.count("<title>") == 3


def test_one_who_waits_can_cancel(studio: Studio) -> None:
    first = studio.run(replace(FORM, steps="50"), "first")
    until(first, "step 1")
    second = studio.run(FORM, "second")
    assert "Waiting" in next(second).status
    studio.cancel("second")
    assert [one.status for one in second] == ["Cancelled."]
    studio.cancel("first")
    list(first)


def test_offered_recipes_run_as_they_are(pipe: Any) -> None:
    offered = offered_recipes()
    assert offered[:4] == ["auto", "balanced", "fast", "max"]
    assert not {"sla", "vsa", "seer"} & set(offered)
    for name in offered:
        asked = Wanted.read(replace(FORM, recipe=name, density=""), pipe).recipe
        with dit_accel.patch(pipe, asked):
            pass
    assert is_clean(pipe)


def test_without_gradio_the_command_says_what_it_needs() -> None:
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "gradio" else real(name, *a)
sys.argv = ["dit-accel", "ui"]
from dit_accel.cli.main import app
app()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "Error: The page needs gradio: pip install 'dit-accel[ui]'.\n")
