"""PSA's levels of key blocks against their definitions, block by block."""

import math

import numpy as np
import pytest
import torch

from dit_accel.stages.levels import (
    finer,
    levels_by_energy,
    levels_by_quota,
    levels_by_similarity,
    sampled_importance,
)


def _importance(nk=23):
    generator = torch.Generator().manual_seed(4)
    importance = torch.rand(2, 3, 5, nk, generator=generator) ** 4
    candidates = torch.rand(2, 1, nk, generator=generator) > 0.2
    return importance, candidates


def _rows(importance, candidates, assign):
    """Levels from a function of (ranked candidates, their importance)."""
    out = np.zeros(importance.shape, np.uint8)
    for b, h, i in np.ndindex(*importance.shape[:3]):
        row = importance[b, h, i].tolist()
        ranked = sorted((j for j in range(len(row)) if candidates[b, 0, j]), key=lambda j: -row[j])
        for j, level in zip(ranked, assign([row[j] for j in ranked]), strict=True):
            out[b, h, i, j] = level
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    ("bounds", "min_full"), [((0.5, 0.6, 0.7, 0.8), 0.06), ((0.4, 0.5, 0.6, 0.8), 0.3)], ids=str
)
def test_levels_by_energy(bounds, min_full):
    importance, candidates = _importance()

    def assign(values):
        total, levels = sum(values), []
        for n in range(len(values)):
            before = sum(values[:n]) / total
            level = next((value for value, bound in zip((1, 2, 4, 8), bounds) if before < bound), 0)
            levels.append(1 if n < math.ceil(min_full * len(values)) else level)
        return levels

    expected = _rows(importance, candidates, assign)
    assert len(expected.unique()) >= 4
    assert torch.equal(levels_by_energy(importance, candidates, bounds, min_full), expected)


@pytest.mark.parametrize(
    ("quotas", "tile"), [((0.05, 0.1, 0.15, 0.25), 32), ((0.1, 0.3, 0.5, 0.9), 64)], ids=str
)
def test_levels_by_quota(quotas, tile):
    importance, candidates = _importance()

    def assign(values):
        levels, reached = [], 0.0
        for level, quota in zip((1, 2, 4, 8), quotas, strict=True):
            group = math.ceil(level / (128 / tile))
            number = math.ceil(round(len(values) * (quota - reached), 6))
            levels += [level] * (math.ceil(number / group) * group)
            reached = quota
        return (levels + [0] * len(values))[: len(values)]

    expected = _rows(importance, candidates, assign)
    assert torch.equal(levels_by_quota(importance, candidates, quotas, tile), expected)


def test_levels_by_similarity():
    generator = torch.Generator().manual_seed(1)
    smooth = (
        torch.randn(2, 3, 7, 1, 16, generator=generator).expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, :103]
    )
    noise = torch.randn(2, 3, 103, 16, generator=generator)
    loud = torch.rand(2, 3, 7, 1, 1, generator=generator).expand(-1, -1, -1, 16, 16).flatten(2, 3)[:, :, :103]
    k = smooth + 1.2 * loud * noise
    found = levels_by_similarity(k, 32)
    expected = torch.ones_like(found)
    for b, h, n in np.ndindex(2, 3, 4):
        keys = k[b, h, 32 * n : 32 * n + 32].double().numpy()
        for level, bound in ((2, 0.7), (4, 0.65), (8, 0.6)):
            pairs = [(g, g + level - 1) for g in range(0, len(keys) - level + 1, level)]
            cosines = [
                keys[x] @ keys[y] / np.linalg.norm(keys[x]) / np.linalg.norm(keys[y]) for x, y in pairs
            ]
            if not pairs or np.mean(cosines) <= bound:
                break
            expected[b, h, n] = level
    assert len(expected.unique()) >= 3
    assert torch.equal(found, expected)
    level = torch.tensor([0, 1, 2, 8], dtype=torch.uint8).view(1, 1, 1, 4)
    allowed = torch.tensor([8, 4, 1, 4], dtype=torch.uint8).view(1, 1, 4)
    assert finer(level, allowed).flatten().tolist() == [0, 1, 1, 4]


@pytest.mark.parametrize("hidden", [False, True])
def test_full_sampling_gives_the_exact_mass(hidden):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 75, 3, 16, generator=generator) for _ in range(2))
    rows = torch.stack([torch.randperm(75, generator=generator) for _ in range(3)])[None]
    key_mask = torch.ones(2, 75, dtype=torch.bool)
    if hidden:
        key_mask[0, 60:] = False
    found = sampled_importance(q, k, 32, 16, rows=rows, key_mask=key_mask if hidden else None, share=1.0)
    for b, h in np.ndindex(2, 3):
        order = rows[0, h]
        logits = (q[b, order, h].double() @ k[b, order, h].double().T / 4.0).masked_fill(
            ~key_mask[b, order], -torch.inf
        )
        mass = torch.nn.functional.pad(logits.softmax(-1), (0, 5, 0, 21))
        expected = mass.unflatten(0, (-1, 32)).unflatten(-1, (-1, 16)).sum((1, 3))
        torch.testing.assert_close(found[b, h].double(), expected, atol=1e-5, rtol=1e-5)


def test_every_block_is_sampled_also_a_short_one():
    q = torch.randn(1, 65, 1, 8)
    importance = sampled_importance(q, q, 32, 32, share=0.25)
    assert importance.shape == (1, 1, 3, 3)
    assert (importance > 0).all()
