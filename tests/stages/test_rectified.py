"""Isolated-pooling reallocation and the selection on it, against the equations."""

import math

import numpy as np
import pytest
import torch

from dit_accel import presets
from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.rectified import Reallocated, pooled_shares
from tests.calls import call_of
from tests.stages.block_oracle import CPU, LAYOUTS, cases, half_hidden, inputs, per_head, selected, views

CASES = cases(Raster(), Tiles((2, 4, 4)), Curve(), Curve(first_frame_apart=True), AxisOrder((("wfh", "fhw", "hwf"),)))
WAN_480P = (21, 30, 52)  # latents of 81 frames of 832 x 480


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


def test_the_first_frame_costs_its_own_blocks():
    """1,560 of 32,760 tokens: twelve whole blocks and a part of one, where one curve spreads them over 58."""
    layout = TokenLayout(WAN_480P, 0, math.prod(WAN_480P))
    count = [
        int(SequenceBlocks(layout, order.rows(layout, CPU), 128, 128, CPU).first_frame_k.sum())
        for order in (Curve(first_frame_apart=True), Curve())
    ]
    assert count == [13, 58]


@pytest.mark.parametrize("peak", [0.0, 3.0], ids=["even attention", "peaked attention"])
def test_the_presets_own_density_on_wan(peak):
    """Even attention is what ``top_p`` asks most blocks of; peaked, a few blocks hold the mass, and a share is kept."""
    recipe, layout = presets.rectified(), TokenLayout(WAN_480P, 0, math.prod(WAN_480P))
    blocks = SequenceBlocks(layout, recipe.order.rows(layout, CPU), 128, 128, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, layout.seq_len, 1, 16, generator=generator) for _ in range(2))
    # Blocks of the curve share a direction, so that their means do not vanish.
    away = torch.randn(-(-layout.seq_len // 128), 16, generator=generator).repeat_interleave(128, 0)
    k[0, blocks.rows.long(), 0] += peak * away[: layout.seq_len]
    q[0, blocks.rows.long(), 0] += peak * away[: layout.seq_len]
    mask = recipe.select.select(blocks, recipe.select.prepare(blocks), call_of(q, k))
    assert (0.19 if peak else 0.22) < float(mask.density()) < (0.21 if peak else 0.25)
