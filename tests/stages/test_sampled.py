"""PSA's sampled importance and the selection on it."""

import math

import numpy as np
import pytest
import torch

from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.sampled import Sampled, sampled_importance
from tests.stages.block_oracle import CPU, LAYOUTS, best, cases, fewest, half_hidden, inputs, per_head, selected, views


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


@pytest.mark.parametrize(("name", "order", "hidden"), cases(Raster(), Tiles((2, 4, 4))), ids=str)
@pytest.mark.parametrize(("density", "top_p"), [(0.3, None), (None, 0.5), (0.1, 0.4)], ids=str)
def test_selection_by_sampled_mass(name, order, hidden, density, top_p):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    places = [torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist() for size in block]
    places = [sorted(drawn[: len(drawn) // 4]) for drawn in places]

    def choose(view):
        def sample(blocks, drawn):
            picked = [[tokens[n] for n in drawn if n < len(tokens)] for tokens in blocks]
            return [tokens or blocks[n][:1] for n, tokens in enumerate(picked)]

        keys = sample(view.k_blocks, places[1])
        shown = np.zeros(layout.seq_len, bool)
        shown[[token for tokens in keys for token in tokens]] = True
        prob = view.probabilities(shown)
        chosen = []
        for tokens in sample(view.q_blocks, places[0]):
            mass = {j: float(prob[np.ix_(tokens, keys[j])].sum()) for j in view.candidates}
            picked = best(mass, density) if density and mass else set()
            if top_p:
                logs = {j: math.log(value) if value else -np.inf for j, value in mass.items()}
                picked |= fewest(logs, top_p)
            chosen.append(picked)
        return chosen

    expected = per_head(choose, views(layout, rows, q, k, block, key_mask))
    select = Sampled(density=density, top_p=top_p, block=block)
    assert torch.equal(selected(select, layout, rows, q, k, key_mask), expected)
