"""PARO's offline figures against their definitions, and heads whose axis is known."""

import numpy as np
import pytest
import torch

from dit_accel import Recipe
from dit_accel.layout import TokenLayout
from dit_accel.stages.order.axes import AXIS_ORDERS, AxisOrder
from dit_accel.stages.order.axis_choice import AxisScores, measure_axes
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("hidden", ["nothing", "keys", "pairs"])
def test_figures(name, hidden, monkeypatch):
    layout, tile = LAYOUTS[name], 32
    q, k = inputs(layout)
    q = q * 2
    monkeypatch.setattr("dit_accel.stages.order.axis_choice.LOGITS_AT_ONCE", 3 * tile * 2 * 3 * layout.seq_len)
    key_mask = half_hidden(layout) if hidden == "keys" else None
    pairs = None
    if hidden == "pairs":
        pairs = torch.rand(2, 1, layout.seq_len, layout.seq_len, generator=torch.Generator().manual_seed(5)) > 0.4
        pairs[:, :, layout.latent_start + 3] = False  # a query of padding
    found = measure_axes(layout, q, k, key_mask=key_mask, pairs=pairs, tile=tile, negligible=4e-3, share=0.75)
    assert 0 < float(found.sparse.mean()) < 1, "thresholds that tell nothing apart"
    latent = np.arange(layout.num_latent).reshape(layout.grid)
    for h in range(3):
        for n, axes in enumerate(AXIS_ORDERS):
            order = layout.latent_start + latent.transpose(*("fhw".index(a) for a in axes)).ravel()
            sparse, ratios = [], []
            for b in range(2):
                logits = q[b, :, h].double().numpy() @ k[b, :, h].double().numpy().T / 4.0
                weights = np.exp(logits - logits.max(1, keepdims=True))
                if hidden == "keys":
                    weights[:, ~key_mask[b].numpy()] = 0
                if hidden == "pairs":
                    weights[~pairs[b, 0].numpy()] = 0
                prob = (weights / np.maximum(weights.sum(1, keepdims=True), 1e-300))[np.ix_(order, order)]
                for i in range(0, len(order), tile):
                    for j in range(0, len(order), tile):
                        part = prob[i : i + tile, j : j + tile]
                        sparse.append((part < 4e-3).mean() >= 0.75)
                        ratios.append(part.max() / part.mean() if part.any() else 1.0)
            assert float(found.sparse[h, n]) == pytest.approx(np.mean(sparse))
            assert float(found.incoherence[h, n]) == pytest.approx(np.mean(ratios), rel=1e-4)


def test_a_head_along_an_axis_gets_that_axis_fastest():
    grid = (8, 8, 8)
    layout = TokenLayout(grid, 0, 512)
    places = np.stack(np.unravel_index(np.arange(512), grid), -1)
    heads = []
    for axis in range(3):
        # Tokens attend to those that share the two other coordinates.
        others = [n for n in range(3) if n != axis]
        group = places[:, others[0]] * 8 + places[:, others[1]]
        heads.append(torch.nn.functional.one_hot(torch.from_numpy(group), 64).float() * 12)
    q = torch.stack(heads, 1)[None]
    scores = measure_axes(layout, q, q, tile=8)
    chosen = scores.choose()
    assert [axes[-1] for axes in chosen] == ["f", "h", "w"]
    recipe = Recipe(order=AxisOrder((chosen,)))
    assert recipe.order.rows(layout, torch.device("cpu")).shape == (3, 512)
    assert AxisScores.mean([scores, scores]).choose() == chosen


def test_sparser_and_more_coherent_both_win():
    even, sparse = torch.ones(1, 6).double(), torch.ones(1, 6).double()
    sparse[0, 3] = 2.0
    assert AxisScores(sparse, even).choose() == (AXIS_ORDERS[3],), "more sparse tiles must win, not lose"
    assert AxisScores(even, sparse).choose() != (AXIS_ORDERS[3],)
    incoherent = even.clone()
    incoherent[0, 3] = 1.5
    both = AxisScores(sparse, incoherent)
    assert both.choose(1.0) == (AXIS_ORDERS[3],)
    assert both.choose(0.0) == (AXIS_ORDERS[0],)
    with pytest.raises(ValueError, match="sparse_weight must lie in"):
        both.choose(1.5)
