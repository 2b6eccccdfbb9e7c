"""Blocks chosen anew from an earlier search's masses, against loops in float64, and when a run does so."""

import math

import numpy as np
import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import LayerMemory, SequenceBlocks
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.order.sorted import SortedSegments
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.calls import attend, call_of
from tests.stages.block_oracle import CPU, LAYOUTS, best, cases, half_hidden, inputs, views

BLOCK = (32, 32)


def _pooled(view):
    """[nq, nk]: scores of block means; 0 for a block of hidden keys, as pooled_scores has it."""
    k = [view.k[tokens].mean(0) if tokens else np.zeros(view.k.shape[1]) for tokens in view.alive]
    return np.array([[view.scale * view.q[a].mean(0) @ b for b in k] for a in view.q_blocks])


def _moved(then, now):
    """[nq, nk]: masses of one view by the square root of the change of pooled weights up to another."""
    mass = then.block_sums(then.probabilities())
    share = mass / mass.sum(1, keepdims=True)
    found = (share + 1e-6) * np.exp(0.5 * (_pooled(now) - _pooled(then)))
    queries = np.array([len(tokens) for tokens in then.q_blocks])
    return found / found.sum(1, keepdims=True) * queries[:, None]


@pytest.mark.parametrize(("name", "order", "hidden"), cases(Raster(), Tiles((2, 4, 4))), ids=str)
def test_masses_move_with_the_scores_of_block_means(name, order, hidden):
    layout, density = LAYOUTS[name], 0.34
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    q, k = inputs(layout)
    later_q, later_k = (now + 0.4 * other for now, other in zip((q, k), inputs(layout, seed=2)))
    select = Mass(density=density, head_adaptive=False, block=BLOCK)
    blocks = SequenceBlocks(layout, rows, *BLOCK, CPU)
    memory = LayerMemory(keeps_base=True)
    first = select.select(blocks, None, call_of(q, k, key_mask=key_mask), memory).to_dense()
    found = select.choose_anew(blocks, call_of(later_q, later_k, key_mask=key_mask), memory).to_dense()
    grids = [views(layout, rows, *pair, BLOCK, key_mask) for pair in ((q, k), (later_q, later_k))]
    # The base is kept in half precision: pairs whose scores it cannot tell apart may change places.
    told_apart = 0
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        then, now = (grid[b][h] for grid in grids)
        moved = _moved(then, now)
        pooled = np.abs(_pooled(then)).max()
        doubt = 2.0**-10 * (0.5 * pooled + math.log(1e6)) + 1e-5
        for i in range(len(now.q_blocks)):
            scores = {j: moved[i, j] for j in now.candidates}
            if not scores:
                continue
            kept = best(scores, density)
            least = min(scores[j] for j in kept)
            for j, score in scores.items():
                if j in now.own(i) or now.text_q[i] or abs(math.log(score / least)) <= doubt:
                    continue
                assert bool(found[b, h, i, j]) == (j in kept)
                told_apart += 1
    assert told_apart > 30
    assert not torch.equal(first, found), "the drift must be large enough to tell the two apart"


def test_nothing_moves_where_nothing_changed():
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    v = inputs(layout, seed=5)[1]
    for select in (presets.mass(0.3, block=BLOCK).select, presets.ear(0.3, block=BLOCK).select):
        blocks = SequenceBlocks(layout, None, *BLOCK, CPU)
        memory = LayerMemory(keeps_base=True)
        call = call_of(q, k, v)
        first = select.select(blocks, None, call, memory).to_dense()
        again = select.choose_anew(blocks, call, memory).to_dense()
        assert (first ^ again).float().mean() <= 0.01  # ties within half precision


def _inputs(seed, heads=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 192, heads, 16, generator=generator) * 2 for _ in range(3)]


LAYOUT = TokenLayout((3, 8, 8), 0, 192)


def _run(recipe, steps):
    """Kinds of the calls of a run, the engine, and the plan of each call that ran sparse."""
    engine = Engine(recipe, ["layer"], "auto", 0)
    plans = {}
    engine.observer = lambda call: plans.setdefault(call.step.index, call.plan)
    dense = []
    for index in range(steps):
        q, k, v = _inputs(index)
        attend(
            engine,
            0,
            AttentionInputs(q, k, v),
            LAYOUT,
            StepContext(index=index, num_steps=steps, forward_id=index),
            lambda index=index, v=v: (dense.append(index), v)[1],
        )
    return dense, engine, plans


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_chooses_anew_between_searches_and_stays_sparse(every):
    recipe = presets.ear(density=0.3, block=BLOCK).with_fields({"schedule.choose_every": every})
    dense, engine, plans = _run(recipe, 10)
    assert dense == [0, 1], "the search is in the last dense step, and no other step is dense"
    rows = recipe.order.rows(LAYOUT, CPU)
    blocks = SequenceBlocks(LAYOUT, rows, *BLOCK, CPU)
    memory = LayerMemory(keeps_base=True)
    expected = recipe.select.select(blocks, None, call_of(*_inputs(1)), memory).to_dense()
    chosen = 1
    for index in range(2, 10):
        if (index - 1) % every == 0:
            expected = recipe.select.choose_anew(blocks, call_of(*_inputs(index)), memory).to_dense()
            chosen += 1
        assert torch.equal(plans[index].mask.to_dense(), expected), index
    assert engine.records[0].plans_made == chosen


def test_searches_are_due_as_before():
    recipe = presets.adaspa(density=0.3, search_at=(0.2, 0.6), block=BLOCK).with_fields({"schedule.choose_every": 2})
    assert _run(recipe, 10)[0] == [0, 1, 2, 6]


def test_an_order_of_the_call_stays_that_of_the_search():
    order = SortedSegments(segment=(3, 4, 4), samples=16)
    recipe = Recipe(
        order=order, select=Mass(0.3, False, block=BLOCK), schedule=Schedule(refresh_every=100, choose_every=1)
    )
    _, engine, plans = _run(recipe, 4)
    assert engine.records[0].plans_made == 4
    assert all(torch.equal(plan.rows, plans[0].rows) for plan in plans.values())


def test_a_bare_transformer_knows_no_steps_and_keeps_its_plan():
    recipe = presets.mass(density=0.3, block=BLOCK).with_fields({"schedule.choose_every": 1})
    engine = Engine(recipe, ["layer"], "auto", 0)
    for index in range(3):
        q, k, v = _inputs(index)
        attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, StepContext(forward_id=index), lambda v=v: v)
    assert engine.records[0].plans_made == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schedule(choose_every=-1), "choose_every must be at least 0 steps, got -1"),
        (lambda: Schedule(choose_every=2, drift_bound=0.1), "both say when a kept plan changes"),
        (lambda: Recipe(select=Pooled(), schedule=Schedule(choose_every=2)), "remembers a search, got Pooled"),
    ],
)
def test_what_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
