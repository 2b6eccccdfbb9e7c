"""Isolated-pooling reallocation and the selection on it, against the equations."""

import math

import numpy as np
import pytest
import torch

from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.rectified import Reallocated, pooled_shares
from tests.calls import call_of
from tests.stages.block_oracle import CPU, LAYOUTS, cases, half_hidden, inputs, per_head, selected, views

CASES = cases(Raster(), Tiles((2, 4, 4)), Curve(), AxisOrder((("wfh", "fhw", "hwf"),)))


def _shares(view, i):
    """Shares of row i: by candidate, and of the text."""
    mean = view.q[view.q_blocks[i]].mean(0)
    blocks = {
        j: len(view.alive[j]) * math.exp(view.scale * (mean @ view.k[view.alive[j]].mean(0))) for j in view.candidates
    }
    text = sum(
        math.exp(view.scale * (mean @ view.k[token]))
        for j, tokens in enumerate(view.alive)
        if view.text_k[j]
        for token in tokens
    )
    total = sum(blocks.values()) + text
    return {j: value / total for j, value in blocks.items()}, text / total


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
def test_shares(name, order, hidden):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    blocks = SequenceBlocks(layout, rows, *block, CPU)
    found = pooled_shares(blocks, call_of(q, k, key_mask=key_mask))
    shares, text = found.blocks, found.text
    for heads in views(layout, rows, q, k, block, key_mask):
        for view in heads:
            for i in range(len(view.q_blocks)):
                expected, rest = _shares(view, i)
                row = np.array([expected.get(j, 0.0) for j in range(len(view.k_blocks))])
                np.testing.assert_allclose(shares[view.b, view.h, i].numpy(), row, rtol=2e-5, atol=1e-7)
                assert float(text[view.b, view.h, i]) == pytest.approx(rest, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize(("name", "order", "hidden"), CASES, ids=str)
@pytest.mark.parametrize(("density", "top_p", "neighbours"), [(0.25, 0.3, 1), (0.1, 0.7, 0)], ids=str)
def test_rectified(name, order, hidden, density, top_p, neighbours):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    per_frame = layout.grid[1] * layout.grid[2]

    def choose(view):
        chosen = []
        for i in range(len(view.q_blocks)):
            shares, _ = _shares(view, i)
            ranked = sorted(shares, key=lambda j: -shares[j])
            sums = np.cumsum([shares[j] for j in ranked])
            count = max(int((sums <= top_p).sum()) + 1, math.ceil(density * len(ranked)))
            near = {
                j
                for j in range(len(view.k_blocks))
                if j * 32 < (i + 1) * 64 + neighbours * 32 and (j + 1) * 32 > i * 64 - neighbours * 32
            }
            first = {
                j
                for j, tokens in enumerate(view.k_blocks)
                if layout.grid[0] > 1 and any(0 <= token - layout.latent_start < per_frame for token in tokens)
            }
            chosen.append(set(ranked[:count]) | near | first)
        return chosen

    expected = per_head(choose, views(layout, rows, q, k, block, key_mask))
    select = Reallocated(density=density, top_p=top_p, neighbours=neighbours, block=block)
    assert torch.equal(selected(select, layout, rows, q, k, key_mask), expected)


def test_hidden_text_may_hold_anything():
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
    key_mask[:, 195:] = False
    wild = k.clone()
    wild[:, 195:] = torch.nan
    select = Reallocated(block=(32, 32))
    assert torch.equal(
        selected(select, layout, None, q, k, key_mask), selected(select, layout, None, q, wild, key_mask)
    )
