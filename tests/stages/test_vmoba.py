"""VMoBA's threshold selection against its listing, and the block form against the per-query form."""

import numpy as np
import pytest
import torch

from dit_accel import presets
from dit_accel.stages.order.axes import Chunks
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.gate import GlobalGate, per_query_chunks
from tests.stages.block_oracle import CPU, LAYOUTS, cases, half_hidden, inputs, per_head, selected, views


def _head_global(gates: dict, own: set, threshold: float) -> set:
    """Pairs kept, from gates by (query, chunk), by the listing's words."""
    low, high = min(gates.values()), max(gates.values())
    normal = {pair: (gate - low) / (high - low) for pair, gate in gates.items()}
    total = sum(normal.values())
    need = max(0.0, threshold - sum(normal[pair] for pair in own if pair in normal) / total)
    others = sorted((pair for pair in normal if pair not in own), key=lambda pair: -normal[pair])
    shares = np.cumsum([normal[pair] for pair in others]) / total
    first = int(np.argmax(shares >= need)) if (shares >= need).any() else len(others) - 1
    return set(others[: first + 1]) | own


@pytest.mark.parametrize(
    ("name", "order", "hidden"), cases(Raster(), Tiles((2, 4, 4)), Chunks(1, (4, 4), (2, 2, 4))), ids=str
)
@pytest.mark.parametrize("threshold", [0.15, 0.5])
def test_vmoba(name, order, hidden, threshold):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU, 1)

    def choose(view):
        queries = [i for i in range(len(view.q_blocks)) if not view.text_q[i]]
        gates = {
            (i, j): float(view.q[view.q_blocks[i]].mean(0) @ view.k[view.alive[j]].mean(0))
            for i in queries
            for j in view.candidates
        }
        own = {(i, j) for i in queries for j in view.own(i)}
        kept = _head_global(gates, own, threshold)
        return [{j for i, j in kept if i == row} for row in range(len(view.q_blocks))]

    expected = per_head(choose, views(layout, rows, q, k, block, key_mask))
    mask = selected(GlobalGate(threshold=threshold, block=block), layout, rows, q, k, key_mask)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.6])
def test_the_per_query_form(threshold):
    q, k = inputs(LAYOUTS["alone"])
    chunk = torch.randint(0, 7, (189,), generator=torch.Generator().manual_seed(0))
    found = per_query_chunks(q, k, chunk, threshold)
    for b in range(2):
        for h in range(3):
            means = [k[b, chunk == c, h].double().mean(0) for c in range(7)]
            gates = {(s, c): float(q[b, s, h].double() @ means[c]) for s in range(189) for c in range(7)}
            own = {(s, int(chunk[s])) for s in range(189)}
            kept = {tuple(pair) for pair in found[b, h].nonzero().tolist()}
            assert kept == _head_global(gates, own, threshold)


def test_both_forms_agree_where_the_queries_of_a_block_agree():
    layout = LAYOUTS["even"]
    q, k = inputs(layout)
    q = q.view(2, 4, 32, 3, 16)[:, :, :1].expand(-1, -1, 32, -1, -1).reshape(q.shape)
    chunk = torch.arange(128) // 32
    per_query = per_query_chunks(q, k, chunk, 0.3)
    per_block = selected(GlobalGate(threshold=0.3, block=(32, 32)), layout, None, q, k)
    # Queries of a block tie, and the threshold may fall among them: the last pair is then kept for some.
    whole, partly = (per_query.unflatten(2, (4, 32)).all(3), per_query.unflatten(2, (4, 32)).any(3))
    assert (whole <= per_block).all()
    assert (per_block <= partly).all()
    assert (partly & ~whole).sum((-1, -2)).max() <= 1


def test_the_partition_turns_with_the_layer_in_the_preset():
    recipe = presets.vmoba()
    assert isinstance(recipe.order, Chunks)
    assert recipe.schedule.dense_fraction == 0.25
    assert len({recipe.order.variant(layer) for layer in range(9)}) == 3
