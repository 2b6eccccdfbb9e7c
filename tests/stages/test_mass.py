"""AdaSpa and SparseD against their equations."""

import numpy as np
import pytest
import torch

from dit_accel import presets
from dit_accel.plan import LayerMemory
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.mass import FrozenMass, Mass, adapted_densities
from tests.kernels.test_block_mass import sample_of
from tests.stages.block_oracle import (
    CPU,
    LAYOUTS,
    best,
    cases,
    half_hidden,
    inputs,
    per_head,
    selected,
    views,
)

CASES = cases(Raster(), Tiles((2, 4, 4)))


def _masses(grid):
    return [[view.block_sums(view.probabilities()) for view in heads] for heads in grid]


def _keep(view, mass, density):
    rows = []
    for i in range(len(view.q_blocks)):
        scores = {j: mass[i, j] for j in view.candidates}
        rows.append(best(scores, density) if scores else set())
    return view.complete(rows)


def _adaspa(heads, masses, density, target):
    """Listing of the paper for one batch item: base mask, recall per head, densities by rank, final mask."""
    recalls = [(mass * _keep(view, mass, density)).sum() / mass.sum() for view, mass in zip(heads, masses, strict=True)]
    number = min(sum(value > target for value in recalls), len(heads) // 2)
    ranked = sorted(range(len(heads)), key=lambda n: -recalls[n])
    shares = [density] * len(heads)
    for n in ranked[:number]:
        shares[n] = density / 2  # sparsity (1 + s) / 2
    for n in ranked[len(heads) - number :]:
        shares[n] = 1.5 * density  # sparsity (3 s - 1) / 2
    return [_keep(view, masses[n], shares[n]) for n, view in enumerate(heads)], number


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
@pytest.mark.parametrize(("density", "target"), [(0.34, 0.62), (0.6, 0.75)])
def test_adaspa(name, order, hidden, density, target):
    layout, block = LAYOUTS[name], (32, 32)
    q, k = inputs(layout, heads=4)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    grid = views(layout, rows, q, k, block, key_mask)
    expected, adapted = zip(
        *(_adaspa(heads, mass, density, target) for heads, mass in zip(grid, _masses(grid), strict=True)),
        strict=True,
    )
    select = Mass(density=density, recall_target=target, block=block)
    assert any(adapted), "no head was adapted, the case shows nothing"
    assert torch.equal(selected(select, layout, rows, q, k, key_mask), torch.tensor(np.array(expected)))


@pytest.mark.parametrize(("name", "hidden"), sorted({(name, hidden) for name, _, hidden in CASES}), ids=str)
def test_mass_in_tiles_with_one_density_for_all_heads(name, hidden):
    recipe = presets.mass(density=0.4, block=(32, 32))
    layout = LAYOUTS[name]
    q, k = inputs(layout, heads=3)
    key_mask = half_hidden(layout) if hidden else None
    rows = recipe.order.rows(layout, CPU)
    grid = views(layout, rows, q, k, recipe.select.block, key_mask)
    expected = [
        [_keep(view, mass, 0.4) for view, mass in zip(heads, masses, strict=True)]
        for heads, masses in zip(grid, _masses(grid), strict=True)
    ]
    assert torch.equal(selected(recipe.select, layout, rows, q, k, key_mask), torch.tensor(np.array(expected)))


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
@pytest.mark.parametrize("stride", [2, 8])
def test_every_nth_query_stands_for_its_block(name, order, hidden, stride):
    layout, block = LAYOUTS[name], (32, 32)
    q, k = inputs(layout, heads=4)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)

    def choose(view):
        probabilities = view.probabilities()
        sampled = [np.asarray(tokens)[sample_of(len(tokens), block[0], stride)] for tokens in view.q_blocks]
        mass = np.array([[probabilities[np.ix_(a, b)].sum() for b in view.k_blocks] for a in sampled])
        return [
            best({j: mass[i, j] for j in view.candidates}, 0.34) if view.candidates else set()
            for i in range(len(view.q_blocks))
        ]

    expected = per_head(choose, views(layout, rows, q, k, block, key_mask))
    select = Mass(density=0.34, head_adaptive=False, block=block, query_stride=stride)
    memory = LayerMemory()
    found = selected(select, layout, rows, q, k, key_mask, memory)
    assert torch.equal(found, expected)
    assert memory.lse is None, "a sample knows no other query's"
    memory.lse = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5)
    if key_mask is not None:
        memory.lse = memory.lse.masked_fill(~key_mask[:, None, None], -torch.inf)
    memory.lse = memory.lse.logsumexp(-1)
    assert torch.equal(selected(select, layout, rows, q, k, key_mask, memory), expected)
    assert not torch.equal(found, selected(Mass(0.34, False, block=block), layout, rows, q, k, key_mask))


@pytest.mark.parametrize("stride", [0, 3, 128])
def test_a_stride_must_divide_a_query_block(stride):
    with pytest.raises(ValueError, match=f"query_stride must divide a query block of 64 tokens, got {stride}"):
        Mass(query_stride=stride)


def test_a_later_search_normalises_with_the_first_ones_lse():
    layout, block = LAYOUTS["text last"], (32, 64)
    memory = LayerMemory()
    select = Mass(density=0.3, head_adaptive=False, block=block)
    rows = Tiles((2, 4, 4)).rows(layout, CPU)
    q, k = inputs(layout, seed=1)
    selected(select, layout, rows, q, k, None, memory)
    first = memory.lse
    drifted_q, drifted_k = (now + 0.7 * other for now, other in zip((q, k), inputs(layout, seed=2)))
    mask = selected(select, layout, rows, drifted_q, drifted_k, None, memory)
    assert memory.lse is first

    def cached(view):
        logits = view.scale * q[view.b, :, view.h].double().numpy() @ k[view.b, :, view.h].double().numpy().T
        lse = np.log(np.exp(logits).sum(1))
        mass = view.block_sums(np.exp(view.scale * view.q @ view.k.T - lse[:, None]))
        return [best({j: mass[i, j] for j in view.candidates}, 0.3) for i in range(len(view.q_blocks))]

    grid = views(layout, rows, drifted_q, drifted_k, block, None)
    expected = per_head(cached, grid)
    assert torch.equal(mask, expected)
    exact = selected(select, layout, rows, drifted_q, drifted_k)
    assert not torch.equal(exact, mask), "the drift must be large enough to tell the two apart"


def test_adapted_densities_keep_the_mean():
    recall = torch.tensor([[0.99, 0.2, 0.85, 0.9, 0.5], [0.1, 0.2, 0.3, 0.4, 0.95]])
    expected = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.3], [0.3, 0.2, 0.2, 0.2, 0.1]]).double()
    torch.testing.assert_close(adapted_densities(recall, 0.2, 0.8), expected)
    assert adapted_densities(recall, 0.9, 0.8).amax() <= 1.0
    torch.testing.assert_close(adapted_densities(recall, 0.9, 0.8).mean(-1), torch.full((2,), 0.9).double())


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
def test_sparsed(name, order, hidden):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)

    def choose(view):
        importance = view.block_sums(view.probabilities(view.latent))
        return [
            best({j: importance[i, j] / len(view.alive[j]) for j in view.candidates}, 0.3) if view.candidates else set()
            for i in range(len(view.q_blocks))
        ]

    expected = per_head(choose, views(layout, rows, q, k, block, key_mask))
    assert torch.equal(selected(FrozenMass(density=0.3, block=block), layout, rows, q, k, key_mask), expected)


def test_text_does_not_sway_the_isolated_choice():
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    loud = k.clone()
    loud[:, layout.num_latent :] *= 5.0
    pick = FrozenMass(density=0.3, block=(32, 32))
    assert torch.equal(selected(pick, layout, None, q, k), selected(pick, layout, None, q, loud))


@pytest.mark.parametrize("stride", [1, 4])
def test_a_search_takes_the_log_sum_exp_of_its_own_step_or_of_the_first(stride):
    """A row whose logits grew since would seem to matter more: budgets of a layer would go there."""
    layout, block = next(iter(LAYOUTS.values())), (32, 32)
    rows = Tiles().rows(layout, CPU)
    q, k = inputs(layout, heads=3)
    grown = q * torch.linspace(0.5, 3.0, q.shape[1])[:, None, None]

    def second(cached):
        select = Mass(0.3, False, block=block, budget="layer", query_stride=stride, cache_lse=cached)
        memory = LayerMemory(lse=_log_sum_exp(q, k))
        if not cached:  # what the step before found is gone when a search begins, and its own may be there
            selected(select, layout, rows, q, k, None, memory)
            assert memory.lse is None
            given = LayerMemory(lse=_log_sum_exp(grown, k))
            assert torch.equal(
                selected(select, layout, rows, grown, k, None, given), selected(select, layout, rows, grown, k, None)
            )
            assert given.lse is None
        return selected(select, layout, rows, grown, k, None, memory)

    alone = selected(Mass(0.3, False, block=block, budget="layer", query_stride=stride), layout, rows, grown, k, None)
    assert torch.equal(second(cached=False), alone)
    assert not torch.equal(second(cached=True), alone), "the case shows nothing"


def _log_sum_exp(q, k):
    return torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).logsumexp(-1)
