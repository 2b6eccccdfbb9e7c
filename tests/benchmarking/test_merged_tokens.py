"""Merging of tokens and attention through merged agents against their words, token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.merged_tokens import merging, through

GRID = (3, 5, 4)


def merged_by_words(x: torch.Tensor, cell: tuple[int, int, int], share: float) -> list[list[int]]:
    """Members of each merged token of one head ``[S, D]``."""
    places = list(itertools.product(*map(range, GRID)))
    to = [n for n, place in enumerate(places) if all(p % c == 0 for p, c in zip(place, cell, strict=True))]
    of = [n for n in range(len(places)) if n not in to]

    def cosine(i: int, j: int) -> float:
        return float(x[i] @ x[j]) / math.sqrt(float(x[i] @ x[i]) * float(x[j] @ x[j]))

    best = {n: max(to, key=lambda m: cosine(n, m)) for n in of}
    ranked = sorted(of, key=lambda n: -cosine(n, best[n]))
    count = min(len(of), round(share * len(places)))
    return [[m, *(n for n in ranked[:count] if best[n] == m)] for m in to] + [[n] for n in ranked[count:]]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cell", [(2, 2, 2), (1, 4, 4)], ids=str)
def test_the_most_alike_are_merged(cell, share):
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(2, 2, 60, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found = merging(x, GRID, cell, share)
    for b, h in itertools.product(range(2), range(2)):
        groups = merged_by_words(x[b, h], cell, share)
        assert found.count == len(groups)
        numbers = found.number[b, h].tolist()
        assert sorted(sorted(n for n in range(60) if numbers[n] == m) for m in range(found.count)) == sorted(
            map(sorted, groups)
        )
        for members in groups:
            m = numbers[members[0]]
            assert (found.means(values)[b, h, m] - values[b, h, members].mean(0)).abs().max() < 1e-12
            assert float(found.sizes(values)[b, h, m]) == len(members)


def test_attention_through_agents():
    generator = torch.Generator().manual_seed(1)
    q, k, v, agents = (torch.randn(1, 1, n, 4, generator=generator, dtype=torch.float64) for n in (7, 6, 6, 3))
    out = through(q, agents, k, v, 0.5, 0.3)[0, 0]
    told = []
    for agent in agents[0, 0]:
        weights = [math.exp(0.5 * float(agent @ key)) for key in k[0, 0]]
        told.append(sum(w * value for w, value in zip(weights, v[0, 0], strict=True)) / sum(weights))
    for n, query in enumerate(q[0, 0]):
        weights = [math.exp(0.5**0.3 * float(query @ agent)) for agent in agents[0, 0]]
        want = sum(w * x for w, x in zip(weights, told, strict=True)) / sum(weights)
        assert (out[n] - want).abs().max() < 1e-12
