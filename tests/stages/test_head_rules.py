"""Static patterns per head: which blocks a rule keeps, from loops over tokens; the search that gives each head one."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import dit_accel
from dit_accel.calibration.carried_steps import CarriedStep, carried_steps
from dit_accel.calibration.patterns import RuleErrors, allocate_rules, measure_rules, search_rules
from dit_accel.calibration.recording import record_inputs
from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.cubes import Cubes
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.head_rules import RULES, HeadRules, window_of
from tests.calls import call_of
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

LAYOUTS = {"alone": TokenLayout((5, 6, 7), 0, 210), "text first": TokenLayout((3, 6, 9), 11, 173)}
HEADS = (
    "full",
    "window 0.34 0.34 0.25",
    "window 1 0.34 0.5 sink",
    "strided 3",
    "strided 3",
    "near 0.3 fhw",
    "near 0.2 h",
    "near 0.3 wf",
    "cells 1 2 3",
    "cells 1 2 3",
)


def kept_blocks(rule, head, layout, rows, block):
    """bool [n, n] from loops over tokens: a pair is kept for any token pair seen, for its own tokens, and for text."""
    _, height, width = layout.grid
    where = {
        layout.latent_start + n: (n // (height * width), n // width % height, n % width)
        for n in range(layout.num_latent)
    }
    blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
    blocks = [[token for token in tokens if token < layout.seq_len - layout.padding] for tokens in blocks]
    text = [any(token not in where for token in tokens) for tokens in blocks]
    middle = [middle_of([where[token] for token in tokens if token in where], layout.grid) for tokens in blocks]
    kept = torch.zeros(len(blocks), len(blocks), dtype=torch.bool)
    for i, j in product(range(len(blocks)), repeat=2):
        if i == j or text[i] or text[j] or rule == "full":
            kept[i, j] = True
        elif rule.startswith("strided"):
            kept[i, j] = j % 3 == head % 3
        elif rule.startswith("near"):
            _, share, counted = rule.split()
            weight = [1.0 if one in counted else 1e-3 for one in "fhw"]
            distance = {
                n: round(sum((w * (a - b)) ** 2 for w, a, b in zip(weight, middle[i], middle[n])), 12)
                for n in range(len(blocks))
                if not text[n]
            }
            nearest = sorted(distance, key=lambda n: (distance[n], n))
            kept[i, j] = j in nearest[: max(1, round(float(share) * len(distance)))]
        elif rule.startswith("cells"):
            cells = [int(value) for value in rule.split()[1:]]
            later = [0.5 if head % 2 and number > 1 else 0.0 for number in cells]
            kept[i, j] = all(
                math.floor(round(a * number + half, 9)) == math.floor(round(b * number + half, 9))
                for a, b, number, half in zip(middle[i], middle[j], cells, later)
            )
        else:
            visible = window_of(rule).visibility(layout.grid)
            first = {t for t, place in where.items() if place[0] == 0} if rule.endswith("sink") else set()
            kept[i, j] = any(
                t in first or all(bool(table[a, b]) for table, a, b in zip(visible, where[s], where[t]))
                for s, t in product(blocks[i], blocks[j])
            )
    return kept


def middle_of(tokens, grid):
    """Mean place of tokens (frame, row, column), in shares of a grid; None of none."""
    if not tokens:
        return None
    return [sum(t[d] + 0.5 for t in tokens) / len(tokens) / grid[d] for d in range(3)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4)), Cubes((2, 4, 2))], ids=["raster", "tiles", "cubes"])
def test_rules_against_loops(name, order):
    layout = LAYOUTS[name]
    if order.pads:
        layout = layout.padded(order.padding(layout))
    rows = order.rows(layout, torch.device("cpu"))
    blocks = SequenceBlocks(layout, rows, 16, 16, torch.device("cpu"))
    select = HeadRules(rules=(("full",), HEADS), block=(16, 16)).of_layer(1)
    q = torch.randn(1, layout.seq_len, len(HEADS), 8)
    found = select.select(blocks, select.prepare(blocks), call_of(q, q)).to_dense()
    plain = list(range(layout.seq_len)) if rows is None else rows.tolist()
    for head, rule in enumerate(HEADS):
        assert torch.equal(found[0, head], kept_blocks(rule, head, layout, plain, 16)), rule
    assert 0.1 < found[0, 1].float().mean() < 0.99


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith("near")])
def test_the_nearest_are_as_many_at_every_size(rule):
    share = float(rule.split()[1])
    for grid in ((8, 24, 24), (8, 32, 32), (8, 28, 20), (21, 30, 30)):
        layout = TokenLayout(grid, 0, math.prod(grid))
        blocks = SequenceBlocks(layout, Tiles().rows(layout, torch.device("cpu")), 64, 64, torch.device("cpu"))
        select = HeadRules(rules=((rule,),), block=(64, 64))
        q = torch.zeros(1, layout.seq_len, 1, 8)
        kept = select.select(blocks, select.prepare(blocks), call_of(q, q)).to_dense()[0, 0].float()
        # Rounded to one block; a last block of fewer tokens may lie nearer to others than to itself.
        assert float(kept.mean()) == pytest.approx(share, abs=0.5 / len(kept) + 1e-6 + 0.01 * share)


def test_a_recipe_of_rules_runs_by_layer_and_head_and_keeps_its_plans():
    tiny = TINY["wan"]
    pipe = tiny.build()
    heads = pipe.transformer.config.num_attention_heads
    one = tuple("window 1.0 0.25 0.25" if head % 2 else "full" for head in range(heads))
    recipe = dit_accel.Recipe(order=SMALL_TILES, select=HeadRules(rules=(one, ("full",)), block=(16, 16)))
    assert dit_accel.Recipe.from_dict(recipe.to_dict()) == recipe
    with dit_accel.patch(pipe, recipe) as handle:
        found = tiny.run(pipe, steps=2)
        records = next(iter(handle.sessions.values())).engine.records
        assert [record.plans_made for record in records] == [1, 1]
        assert float(records[0].density_sum) < records[0].sparse_calls
        assert float(records[1].density_sum) == records[1].sparse_calls
    with dit_accel.patch(pipe, recipe.with_fields({"select.rules": (("full",),)})):
        full = tiny.run(pipe, steps=2)
    assert not torch.equal(found, full)
    wrong = recipe.with_fields({"select.rules": (("full", "strided 2", "full"),)})
    with dit_accel.patch(pipe, wrong), pytest.raises(ValueError, match=r"select\.rules are for 3 heads, the layer has"):
        tiny.run(pipe, steps=1)


NO_RULES = (
    "",
    "window 1 2",
    "window 0.5 0.5 0.5 sunk",
    "strided 0",
    "strided x",
    "fully",
    "window 2.0 1 1",
    "near 0.5",
    "near 1.5 hw",
    "near 0 hw",
    "near 0.5 hx",
    "near 0.5 hh",
    "cells 1 2",
    "cells 0 2 2",
)


@pytest.mark.parametrize("rule", NO_RULES)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match=r"select\.rules must be 'full', 'near SHARE DIMENSIONS'"):
        HeadRules(rules=((rule,),))


def test_the_budget_goes_where_it_helps_most():
    errors = RuleErrors(
        ("small", "middle", "all"),
        torch.tensor([[[0.2, 0.6, 1.0], [0.2, 0.6, 1.0]]], dtype=torch.float64),
        torch.tensor([[[0.9, 0.1, 0.0], [0.3, 0.25, 0.0]]], dtype=torch.float64),
    )
    assert allocate_rules(errors, 0.2) == (("small", "small"),)
    assert allocate_rules(errors, 0.4) == (("middle", "small"),)
    # What is left does not reach a whole step of the second head, whose hull has no middle.
    assert allocate_rules(errors, 0.5) == (("middle", "small"),)
    assert allocate_rules(errors, 0.8) == (("middle", "all"),)
    assert allocate_rules(errors, 1.0) == (("all", "all"),)
    with pytest.raises(ValueError, match=r"must lie in \[0\.2000, 1\], got 0\.1"):
        allocate_rules(errors, 0.1)


def test_search_finds_rules_that_err_less_than_one_for_all():
    pipe = TINY["wan"].build()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data *= 3
    recipe = dit_accel.presets.patterns(dense_fraction=0.0).with_fields(
        {"order.shape": (2, 2, 4), "select.block": (16, 16)}
    )
    rules = ("full", "window 1.0 0.25 0.25", "window 0.34 1.0 1.0", "window 1.0 0.34 1.0", "strided 4")
    width = pipe.transformer.config.text_dim
    options = {name: torch.randn(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    arguments = {"height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    found = search_rules(pipe, [options], recipe, mean_density=0.7, rules=rules, samples=1, generate_kwargs=arguments)
    assert found.density <= 0.7 + 1e-9
    assert found.best_single in rules
    assert found.error <= found.error_single
    assert found.recipe.select.block == (16, 16)
    layers, heads = len(pipe.transformer.blocks), pipe.transformer.config.num_attention_heads
    assert [len(layer) for layer in found.recipe.select.rules] == [heads] * layers
    assert float(found.errors.error[..., 0].max()) < 1e-9
    # At another size than that of the search.
    with dit_accel.patch(pipe, found.recipe) as handle:
        pipe(**options, **{**arguments, "height": 128, "width": 96})
        assert 0.0 < handle.summary().density < 1.0
    assert set(RULES) >= {"full", "strided 4"}


CARRIED = dit_accel.presets.patterns(dense_fraction=0.1, dense_at=(0.2, 0.5)).with_fields(
    {"order.shape": (2, 2, 4), "select.block": (16, 16), "select.rules": (("near 0.25 hw",),)}
)


def test_where_patterns_carry_the_first_step_and_one_at_each_point_are_dense():
    assert carried_steps(CARRIED, 10, 3) == [
        CarriedStep(2, None),
        CarriedStep(3, 0.9),
        CarriedStep(5, None),
        CarriedStep(6, 0.9),
        CarriedStep(8, pytest.approx(0.7)),
    ]
    assert [one.index for one in carried_steps(CARRIED, 30, 2)] == [6, 9, 15, 23]
    with pytest.raises(ValueError, match="No step of 1 is sparse"):
        carried_steps(CARRIED, 1, 1)
    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, CARRIED) as handle:
        tiny.run(pipe, steps=10)
        (session,) = handle.sessions.values()
        for record in session.engine.records:
            dense = sum(record.dense_calls.values())
            assert dense > 0
            assert record.sparse_calls * 3 == dense * 7  # three steps of ten


def test_rules_are_measured_by_what_is_left_when_the_last_dense_step_is_carried():
    tiny = TINY["wan"]
    pipe = tiny.build()
    inputs = record_inputs(pipe.transformer, lambda: tiny.run(pipe), lambda number: number == 0)
    rules = ("near 0.25 hw", "strided 2", "full")
    plain = measure_rules(pipe.transformer, CARRIED, inputs, rules)
    assert float(plain.error[..., :2].min()) > 1e-9
    # The same input is its own dense step: what is carried is a share of the very error.
    for share in (1.0, 0.5, 0.0):
        found = measure_rules(pipe.transformer, CARRIED, 2 * inputs, rules, shares=(None, share))
        torch.testing.assert_close(found.error, plain.error * (1.0 - share) ** 2, rtol=1e-4, atol=1e-12)
        assert torch.equal(found.kept, plain.kept)


def test_search_of_patterns_that_carry_keeps_the_schedule_and_errs_less():
    pipe = TINY["wan"].build()
    pipe.set_progress_bar_config(disable=True)
    width = pipe.transformer.config.text_dim
    torch.manual_seed(6)
    options = {name: torch.randn(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    arguments = {"height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 10, "output_type": "latent"}
    rules = ("full", "near 0.25 hw", "near 0.25 fhw")
    asked = {"mean_density": 0.5, "rules": rules, "samples": 2, "generate_kwargs": arguments}
    found = search_rules(pipe, [options], CARRIED, **asked)
    assert (found.recipe.schedule, found.recipe.compensate) == (CARRIED.schedule, CARRIED.compensate)
    plain = search_rules(pipe, [options], CARRIED.with_fields({"schedule": "schedule", "compensate": "none"}), **asked)
    assert found.error < plain.error


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_each_of_two_experts_is_measured_in_the_steps_that_it_runs(expert, carries):
    pipe = TINY["wan2.2"].build()
    pipe.set_progress_bar_config(disable=True)
    width = pipe.transformer.config.text_dim
    options = {name: torch.randn(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    arguments = {"height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 8, "output_type": "latent"}
    recipe = CARRIED if carries else CARRIED.with_fields({"schedule": "schedule", "compensate": "none"})
    asked = {"mean_density": 0.5, "rules": ("full", "near 0.25 hw"), "generate_kwargs": arguments}
    found = search_rules(pipe, [options], recipe, transformer=expert, samples=3, **asked)
    assert float(found.errors.error[..., 0].max()) < 1e-9
    assert float(found.errors.error[..., 1].min()) > 1e-9


def test_an_expert_that_runs_in_no_measured_step_is_named():
    pipe = TINY["wan2.2"].build()
    pipe.set_progress_bar_config(disable=True)
    width = pipe.transformer.config.text_dim
    options = {name: torch.randn(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    arguments = {"height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    recipe = CARRIED.with_fields({"schedule": "schedule", "compensate": "none"})
    with pytest.raises(ValueError, match="'transformer' runs in none of the 1 steps"):
        search_rules(
            pipe, [options], recipe, mean_density=0.5, transformer="transformer", samples=1, generate_kwargs=arguments
        )


def test_a_transformer_that_begins_late_begins_densely():
    assert carried_steps(CARRIED, 10, 1, first=6) == [CarriedStep(6, None), CarriedStep(7, 0.9)]
