"""Static patterns per head: which blocks a rule keeps, from loops over tokens; the search that gives each head one."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import dit_accel
from dit_accel.calibration.patterns import RuleErrors, allocate_rules, search_rules
from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.head_rules import RULES, HeadRules, window_of
from tests.calls import call_of
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

LAYOUTS = {"alone": TokenLayout((5, 6, 7), 0, 210), "text first": TokenLayout((3, 6, 9), 11, 173)}
HEADS = ("full", "window 0.34 0.34 0.25", "window 1 0.34 0.5 sink", "strided 3", "strided 3")


def kept_blocks(rule, head, layout, rows, block):
    """bool [n, n] from loops over tokens: a pair is kept for any token pair seen, for its own tokens, and for text."""
    _, height, width = layout.grid
    where = {
        layout.latent_start + n: (n // (height * width), n // width % height, n % width)
        for n in range(layout.num_latent)
    }
    blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
    text = [any(token not in where for token in tokens) for tokens in blocks]
    kept = torch.zeros(len(blocks), len(blocks), dtype=torch.bool)
    for i, j in product(range(len(blocks)), repeat=2):
        if i == j or text[i] or text[j] or rule == "full":
            kept[i, j] = True
        elif rule.startswith("strided"):
            kept[i, j] = j % 3 == head % 3
        else:
            visible = window_of(rule).visibility(layout.grid)
            first = {t for t, place in where.items() if place[0] == 0} if rule.endswith("sink") else set()
            kept[i, j] = any(
                t in first or all(bool(table[a, b]) for table, a, b in zip(visible, where[s], where[t]))
                for s, t in product(blocks[i], blocks[j])
            )
    return kept


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
def test_rules_against_loops(name, order):
    layout = LAYOUTS[name]
    rows = order.rows(layout, torch.device("cpu"))
    blocks = SequenceBlocks(layout, rows, 16, 16, torch.device("cpu"))
    select = HeadRules(rules=(("full",), HEADS), block=(16, 16)).of_layer(1)
    q = torch.randn(1, layout.seq_len, len(HEADS), 8)
    found = select.select(blocks, select.prepare(blocks), call_of(q, q)).to_dense()
    plain = list(range(layout.seq_len)) if rows is None else rows.tolist()
    for head, rule in enumerate(HEADS):
        assert torch.equal(found[0, head], kept_blocks(rule, head, layout, plain, 16)), rule
    assert 0.1 < found[0, 1].float().mean() < 0.99


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


NO_RULES = ("", "window 1 2", "window 0.5 0.5 0.5 sunk", "strided 0", "strided x", "fully", "window 2.0 1 1")


@pytest.mark.parametrize("rule", NO_RULES)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match=r"select\.rules must be 'full', 'window F H W'"):
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
