"""One budget for many rows, against sorting in numpy."""

import math

import numpy as np
import pytest
import torch

from dit_accel.kernels.selection.shared_budget import best_of_all


def _expected(scores, allowed, always, density, across_heads):
    """bool [B, H, nq, nk], one pair after the other."""
    keep = np.zeros(scores.shape, bool)
    for b in range(scores.shape[0]):
        heads = range(scores.shape[1])
        for group in [list(heads)] if across_heads else [[h] for h in heads]:
            budget, first, others = 0, [], []
            for h in group:
                for i, row in enumerate(scores[b, h]):
                    open_ = [j for j in range(len(row)) if allowed[b, h, i, j]]
                    if not open_:
                        continue
                    share = density if isinstance(density, float) else round(float(density[b, h]), 6)
                    budget += math.ceil(share * len(open_) - 1e-9)
                    values = {j: 0.0 if math.isnan(row[j]) else row[j] for j in open_}
                    best = min(open_, key=lambda j: (-values[j], j))
                    for j in open_:
                        kept = always[b, h, i, j] or j == best
                        (first if kept else others).append((-values[j], h, i, j))
            for _, h, i, j in first + sorted(others)[: max(0, budget - len(first))]:
                keep[b, h, i, j] = True
    return keep


@pytest.mark.parametrize("across_heads", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("density", [0.07, 0.31, 1.0, "per head"])
@pytest.mark.parametrize("case", ["plain", "ties and zeros", "not a number"])
def test_as_many_pairs_as_rows_would_take_wherever_they_score_most(across_heads, density, case):
    generator = torch.Generator().manual_seed(3)
    batch, heads, nq, nk = 2, 3, 5, 11
    scores = torch.rand(batch, heads, nq, nk, generator=generator) * torch.tensor([1e-6, 1.0, 1e9])[:, None, None]
    if case == "ties and zeros":
        scores = (scores * 4).round().clamp_max(2.0)
        scores[0, 1] = 0.0
    elif case == "not a number":
        scores[torch.rand(scores.shape, generator=generator) < 0.1] = torch.nan
        scores[1, 2, 3, 4] = torch.inf
    allowed = torch.rand(batch, 1, nq, nk, generator=generator) < 0.8
    allowed[0, 0, 2] = False
    always = (torch.rand(1, heads, nq, nk, generator=generator) < 0.05) & allowed
    if density == "per head":
        density = torch.tensor([[0.1, 0.5, 1.0], [0.9, 0.05, 0.3]])
    shown = [x.expand(scores.shape).numpy() for x in (allowed, always)]
    found = best_of_all(scores, allowed, always, density, across_heads)
    wide = scores.double().nan_to_num(nan=torch.nan, posinf=float(torch.finfo(torch.float32).max))
    expected = _expected(wide.numpy(), *shown, density, across_heads)
    assert torch.equal(found, torch.tensor(expected))
    assert found.any(-1).equal(allowed.expand(scores.shape).any(-1)), "a row was left with nothing"


def test_a_budget_goes_where_the_scores_are():
    scores = torch.zeros(1, 2, 4, 10)
    scores[0, 1] = torch.arange(1.0, 41.0).view(4, 10)
    everything = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    found = best_of_all(scores, everything, ~everything, 0.4, across_heads=True)
    assert found.sum(-1)[0].tolist() == [[1, 1, 1, 1], [1, 7, 10, 10]]
