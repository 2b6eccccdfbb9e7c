"""Mass scored by the change of the output, and budgets that rows or heads share, against loops in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel import presets
from dit_accel.heads import HeadShard
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.mass import Mass
from tests.calls import call_of
from tests.stages.block_oracle import CPU, LAYOUTS, best, cases, half_hidden, inputs, views

CASES = cases(Raster(), Tiles((2, 4, 4)))
BLOCK = (32, 32)


def _errors(view, v):
    """[nq, nk]: mass times the distance of a key block's mean value from a query block's mean output."""
    mass = view.block_sums(view.probabilities())
    value = np.array([v[tokens].mean(0) if tokens else np.zeros(v.shape[1]) for tokens in view.alive])
    out = (mass[:, :, None] * value).sum(1) / mass.sum(1)[:, None]
    return mass * np.linalg.norm(out[:, None] - value[None], axis=-1)


def _together(heads, scores, density):
    """bool [H, nq, nk] of heads with one budget: first what each row must have, then wherever scores are largest."""
    budget, first, others = 0, [], []
    for h, view in enumerate(heads):
        for i in range(len(view.q_blocks)):
            if view.text_q[i] or not view.candidates:
                continue
            row = {j: scores[h][i, j] for j in view.candidates}
            budget += math.ceil(density * len(row) - 1e-9)
            must = best(row, 1e-9) | (view.own(i) & set(row))
            first += [(h, i, j) for j in must]
            others += [(-score, h, i, j) for j, score in row.items() if j not in must]
    chosen = [[set() for _ in view.q_blocks] for view in heads]
    for _, h, i, j in [(0, *place) for place in first] + sorted(others)[: max(0, budget - len(first))]:
        chosen[h][i].add(j)
    return np.array([view.complete(rows) for view, rows in zip(heads, chosen, strict=True)])


def _by_rows(view, scores, density):
    return view.complete(
        [best({j: scores[i, j] for j in view.candidates}, density) for i in range(len(view.q_blocks))]
        if view.candidates
        else [set() for _ in view.q_blocks]
    )


def _kept(select, layout, rows, q, k, v, key_mask, shard=None):
    blocks = SequenceBlocks(layout, rows, *select.block, CPU)
    call = replace(call_of(q, k, v, key_mask=key_mask), heads=shard)
    return select.select(blocks, None, call, None).to_dense().expand(q.shape[0], q.shape[2], -1, -1)


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
@pytest.mark.parametrize("score", ["mass", "error"])
@pytest.mark.parametrize("budget", ["row", "head", "layer"])
def test_pairs_are_chosen_by_their_score_within_a_budget(name, order, hidden, score, budget):
    layout, density = LAYOUTS[name], 0.34
    q, k = inputs(layout, heads=4)
    v = inputs(layout, heads=4, seed=5)[1]
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    grid = views(layout, rows, q, k, BLOCK, key_mask)
    scores = [
        [
            _errors(view, v[view.b, :, view.h].double().numpy())
            if score == "error"
            else view.block_sums(view.probabilities())
            for view in heads
        ]
        for heads in grid
    ]
    if budget == "row":
        expected = [
            [_by_rows(view, one, density) for view, one in zip(heads, of, strict=True)]
            for heads, of in zip(grid, scores, strict=True)
        ]
    elif budget == "head":
        expected = [
            [_together([view], [one], density)[0] for view, one in zip(heads, of, strict=True)]
            for heads, of in zip(grid, scores, strict=True)
        ]
    else:
        expected = [_together(heads, of, density) for heads, of in zip(grid, scores, strict=True)]
    select = Mass(density=density, head_adaptive=False, block=BLOCK, score=score, budget=budget)
    found = _kept(select, layout, rows, q, k, v, key_mask)
    assert torch.equal(found, torch.tensor(np.array(expected)))
    if key_mask is None:
        assert found.any(-1).all()


def test_values_that_all_keys_share_change_nothing():
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    v = inputs(layout, seed=5)[1]
    select = Mass(density=0.3, head_adaptive=False, block=BLOCK, score="error", budget="layer")
    assert torch.equal(
        _kept(select, layout, None, q, k, v, None), _kept(select, layout, None, q, k, v + 1000.0, None)
    )  # rounding of 1000 would show: 1e-4 of a value


@pytest.mark.parametrize("name", ["alone", "text first"])
@pytest.mark.parametrize("budget", ["head", "layer"])
@pytest.mark.parametrize("orders", ["one", "an order per head"])
def test_processes_with_some_heads_each_choose_what_one_does(name, budget, orders):
    layout = LAYOUTS[name]
    q, k = inputs(layout, heads=4)
    v = inputs(layout, heads=4, seed=5)[1]
    rows = None
    if orders != "one":
        rows = AxisOrder((("fhw", "whf", "hfw", "fwh"),)).rows(layout, CPU)
    select = Mass(density=0.3, head_adaptive=False, block=BLOCK, score="error", budget=budget)
    whole = _kept(select, layout, rows, q, k, v, None)
    parts = [(0, 1), (1, 3)]  # first and number of heads
    asked = [[], []]

    def kept(part, gather):
        first, number = parts[part]
        own = slice(first, first + number)
        shard = HeadShard(first, number, 4, gather)
        mine = rows if rows is None else rows[own]
        return _kept(select, layout, mine, *(x[:, :, own] for x in (q, k, v)), None, shard)

    # What every process hands in, in turn; then all get all of it.
    for part in (0, 1):
        kept(part, lambda x, part=part: asked[part].append(x) or _of_all(x))
    for part, (first, number) in enumerate(parts):
        turns = iter(zip(*asked, strict=True))
        found = kept(part, lambda x, turns=turns: torch.cat(next(turns), 1))
        assert torch.equal(found, whole[:, first : first + number])
    assert len(asked[0]) == {"head": 0, "layer": 1 if rows is None else 3}[budget]


def _of_all(own):
    """Something in the shape of what four heads have."""
    return own[:, :1].expand(-1, 4, *own.shape[2:])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"score": "values"}, "select.score must be mass or error, got 'values'"),
        ({"budget": "model"}, "select.budget must be row, head or layer, got 'model'"),
        ({"budget": "head", "head_adaptive": True}, "it needs select.budget row, got head"),
        ({"budget": "layer", "head_densities": ((0.1, 0.2),)}, "select.budget layer has one"),
    ],
)
def test_what_cannot_be(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mass(**({"head_adaptive": False} | fields))


def test_error_aware_routing_is_mass_but_for_score_and_budget():
    mass, ear = presets.mass(density=0.1), presets.ear(density=0.1)
    assert (ear.select.score, ear.select.budget) == ("error", "layer")
    assert ear.with_fields({"select.score": "mass", "select.budget": "row"}) == mass
