"""What a user sees of a patch in a terminal and in a notebook, and counts that begin anew."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.cli.options import read_recipe
from dit_accel.patches.summary import COLUMNS, LayerSummary, PatchSummary
from dit_accel.presets.spelling import short_line
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.select.mass import Mass
from tests.peaked import RECIPES
from tests.tiny import TINY


class Owned(Mass):
    """A stage without a name."""


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_its_own_short_line(name: str) -> None:
    recipe = presets.resolve(name)
    line = short_line(recipe)
    assert ";" not in line
    assert presets.resolve(line) == recipe, "two presets may be the same recipe"


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (presets.pooled(density=0.1), "pooled; select.density=0.1"),
        (presets.mass(density=0.3, dense_fraction=0.1), None),
        (presets.mass().with_fields({"order": "curve"}), "mass; order=curve"),
        (
            presets.pooled(density=0.1).with_fields({"order": "tiles", "order.shape": (2, 8, 8)}),
            "pooled; order.shape=(2, 8, 8); select.density=0.1",
        ),
        (
            presets.sage().with_fields({"precision.key_scales": "thread"}),
            None,
        ),
        (presets.mass().with_fields({"compensate": "residual", "schedule.drift_bound": 0.2}), None),
    ],
)
def test_a_short_line_is_what_the_command_line_reads(recipe: Recipe, line: str | None) -> None:
    found = short_line(recipe)
    assert line is None or found == line
    assert read_recipe(found, None) == recipe
    assert len(found) <= COLUMNS


def test_what_a_short_line_leaves_out() -> None:
    heads = presets.pooled().with_fields({"select.head_densities": tuple((0.1, 0.2) for _ in range(30))})
    assert short_line(heads) == "pooled; select.head_densities=<30 entries>"
    assert short_line(replace(presets.mass(), select=Owned(density=0.4))).startswith("mass; select=Owned; ")


def test_the_preset_of_somebody_else_names_a_recipe_and_breaks_nothing() -> None:
    def mine() -> Recipe:
        return presets.window((1, 3, 3), (1, 2, 2))

    def broken() -> Recipe:
        raise RuntimeError("not here")

    dit_accel.register("mine")(mine)
    dit_accel.register("broken")(broken)
    try:
        assert short_line(mine()) == "mine"
        assert short_line(presets.window()) == "window"
    finally:
        dit_accel.unregister("mine", mine)
        dit_accel.unregister("broken", broken)


def run(pipe: Any, steps: int = 5) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=steps)


def test_a_handle_in_a_terminal() -> None:
    pipe = TINY["wan"].build()
    handle = dit_accel.patch(pipe, "pooled", density=0.5)
    assert repr(handle) == (
        "<PatchHandle of WanPipeline: pooled; select.density=0.5; 2 layers, 0 sparse and 0 dense calls>"
    )
    run(pipe)
    # Of five steps the first is dense, each with two branches in two layers.
    assert "2 layers, 16 sparse and 4 dense calls>" in repr(handle)
    summary = handle.summary()
    assert str(summary).splitlines()[0] == "recipe: pooled; select.density=0.5"
    assert repr(summary) == (
        "<PatchSummary of pooled; select.density=0.5: 2 layers, 16 sparse calls at density "
        f"{summary.density:.3f}, 4 dense>"
    )
    assert summary.recipe == repr(handle.recipe)
    assert summary.to_dict()["short_recipe"] == "pooled; select.density=0.5"
    handle.remove()
    assert repr(handle).startswith("<PatchHandle of WanPipeline (removed): pooled; ")


@pytest.mark.parametrize("recipe", [None, "adaspa", "sage", "psa", "balanced"])
def test_a_summary_fits_a_terminal(recipe: str | None) -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, recipe) as handle:
        run(pipe)
        summary = handle.summary()
    lines = str(summary).splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(summary.lines()).split()), "nothing is cut"
    if recipe is None:
        assert lines[0].startswith("recipe: mass; select.density=0.3; compensate=residual")


class Cells(HTMLParser):
    """The texts of a table's rows, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


def test_a_summary_in_a_notebook() -> None:
    pipe = TINY["wan"].build()
    recipe = dit_accel.presets.pooled(density=0.5).with_fields({"schedule.few_steps": 0})
    with dit_accel.patch(pipe, recipe) as handle:
        run(pipe)
        summary = handle.summary()
    cells = Cells(summary._repr_html_())
    assert cells.rows[0] == ["layer", "sparse calls", "dense calls", "plans", "density"]
    assert cells.rows[1:] == [
        [layer.name, "8", "2 (dense phase)", str(layer.plans_made), f"{layer.density:.3f}"] for layer in summary.layers
    ]
    assert f"recipe: {summary.short_recipe}" in summary._repr_html_()


def test_a_summary_in_a_notebook_is_escaped() -> None:
    layer = LayerSummary("<b>&", 1, {"<i>reason</i>": 2}, 1, 0.25, 3, 4)
    summary = PatchSummary("<script>", "<u>", ("<s>",), (layer,), {"attention": {"<a>": "<em>"}}, 0.0, 0.0, 0.0)
    cells = Cells(summary._repr_html_())
    assert set(cells.tags) == {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert cells.tags.count("b") == 1
    assert cells.rows == [
        ["layer", "sparse calls", "dense calls", "plans", "density", "from a cache", "NaN"],
        ["<b>&", "1", "2 (<i>reason</i>)", "1", "0.250", "4", "3"],
    ]


@pytest.mark.parametrize("recipe", ["mass", "pooled"])
def test_counts_begin_anew_and_plans_stay(recipe: str) -> None:
    """A reset between two steps changes no result, and the rest of the run is all that is counted after it."""
    pipe = TINY["wan"].build()
    asked = replace(RECIPES[recipe], reuse=Listed((0, 1, 2, 4), 6))
    with dit_accel.patch(pipe, asked) as handle:
        wanted = run(pipe, 6)
        whole = handle.summary()
        handle.reset()
        empty = handle.summary()
        assert (empty.sparse_calls, empty.dense_calls, empty.density) == (0, {}, None)
        assert (empty.plan_seconds, empty.sparse_seconds, empty.dense_seconds) == (0, 0, 0)
        assert (empty.computed_forwards, empty.skipped_forwards, empty.backends) == (0, 0, {})
        assert all(layer.plans_made == 0 for layer in empty.layers)
        assert repr(handle).endswith("2 layers, 0 sparse and 0 dense calls>")

        def half_way(_pipe: Any, step: int, _timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            if step == 2:
                before.append(handle.summary())
                handle.reset()
            return arguments

        before: list[PatchSummary] = []
        out = run_with(pipe, half_way)
        after = handle.summary()
    assert out.equal(wanted)
    for count in ("sparse_calls", "computed_forwards", "skipped_forwards"):
        assert getattr(before[0], count) + getattr(after, count) == getattr(whole, count)
    made = [sum(layer.plans_made for layer in one.layers) for one in (before[0], after, whole)]
    assert made[0] + made[1] == made[2]
    assert before[0].computed_forwards == 6


def run_with(pipe: Any, callback: Any) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=6, callback_on_step_end=callback)


def test_what_is_true_of_a_patch_stays() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "pooled") as handle:
        engine = next(iter(handle.sessions.values())).engine
        engine.note("Of the model.", lasting=True)
        engine.note("Of a call.")
        run(pipe)
        noted = handle.summary().notes
        assert any("slower than dense here" in note for note in noted)
        handle.reset()
        assert handle.summary().notes == ("Of the model.",)
        run(pipe)
        assert set(handle.summary().notes) == set(noted) - {"Of a call."}, "advice is given anew"


def test_calls_of_compiled_code_are_counted_anew() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "pooled") as handle:
        (session,) = handle.sessions.values()
        counts = session.engine.records[0].compiled_dense
        assert counts is not None
        counts[0] = 3
        assert sum(handle.summary().dense_calls.values()) == 3
        handle.reset()
        assert not handle.summary().dense_calls
        assert session.engine.records[0].compiled_dense is counts, "a compiled graph holds this very tensor"
