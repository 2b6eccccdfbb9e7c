"""Segmented permutation against its definition, and selections on an order per batch item and head."""

import itertools

import numpy as np
import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.stages.order.sorted import SortedSegments
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.calls import attend, call_of
from tests.stages.block_oracle import LAYOUTS, best, fewest, half_hidden, inputs, per_head, selected, views
from tests.stages.oracle import masked_attention

SEGMENT = (2, 4, 4)


def _expected_rows(layout, q, k, key_mask, samples):
    segment = SEGMENT if layout.grid[0] > 1 else (1, 8, 4)
    places = list(itertools.product(*map(range, layout.grid)))
    count = min(samples, len(places))
    sample = [layout.latent_start + int((n + 0.5) * len(places) / count) for n in range(count)]
    latents = range(layout.latent_start, layout.latent_start + len(places))
    others = [token for token in range(layout.seq_len) if token not in latents]
    batch, _, heads, dim = q.shape
    rows = torch.empty(batch, heads, layout.seq_len, dtype=torch.int32)
    for b, h in np.ndindex(batch, heads):
        logits = q[b, sample, h].double().numpy() @ k[b, :, h].double().numpy().T / dim**0.5
        if key_mask is not None:
            logits[:, ~key_mask[b].numpy()] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        score = (weights / weights.sum(1, keepdims=True)).mean(0)

        def where(n, score=score):
            return (
                [x // size for x, size in zip(places[n], segment, strict=True)],
                -score[layout.latent_start + n],
            )

        order = sorted(range(len(places)), key=where)
        rows[b, h] = torch.tensor([layout.latent_start + n for n in order] + others)
    return rows


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("samples", [7, 1000])
def test_segments_are_sorted_by_sampled_attention(samples, name, hidden):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    # text keys alone are hidden, if there are any: latents always count
    key_mask = half_hidden(layout) if hidden and layout.latent_start == 0 and layout.num_extra else None
    rows = SortedSegments(SEGMENT, samples).rows_of_call(layout, call_of(q, k, key_mask=key_mask))
    assert torch.equal(rows, _expected_rows(layout, q, k, key_mask, samples))


@pytest.mark.parametrize("name", LAYOUTS)
def test_selections_on_the_sorted_order(name):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout)
    rows = SortedSegments(SEGMENT, 16).rows_of_call(layout, call_of(q, k, key_mask=key_mask))
    grid = views(layout, rows, q, k, block, key_mask)

    def pooled(view):
        chosen = []
        for tokens in view.q_blocks:
            mean = view.q[tokens].mean(0)
            scores = {j: view.scale * float(mean @ view.k[view.alive[j]].mean(0)) for j in view.candidates}
            chosen.append(fewest(scores, 0.6))
        return chosen

    def mass(view):
        sums = view.block_sums(view.probabilities())
        return [best({j: sums[i, j] for j in view.candidates}, 0.3) for i in range(len(sums))]

    top_p = Pooled(density=None, top_p=0.6, block=block)
    assert torch.equal(selected(top_p, layout, rows, q, k, key_mask), per_head(pooled, grid))
    exact = Mass(density=0.3, head_adaptive=False, block=block)
    assert torch.equal(selected(exact, layout, rows, q, k, key_mask), per_head(mass, grid))


@pytest.mark.parametrize("name", ["alone", "text first", "text last"])
def test_the_engine_runs_on_the_order_of_the_call(name):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    order, block = SortedSegments(SEGMENT, 16), (32, 32)
    recipe = Recipe(order=order, select=Pooled(density=0.3, block=block))
    engine = Engine(recipe, ["layer"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: q)
    rows = order.rows_of_call(layout, call_of(q, k))
    keep = selected(recipe.select, layout, rows, q, k)
    mask = torch.zeros(2, 3, layout.seq_len, layout.seq_len, dtype=torch.bool)
    for b, h in np.ndindex(2, 3):
        tokens = keep[b, h].repeat_interleave(32, 0).repeat_interleave(32, 1)
        slots = rows[b, h].long()
        mask[b, h][slots[:, None], slots] = tokens[: layout.seq_len, : layout.seq_len]
    expected = masked_attention(q, k, v, mask)
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_what_does_not_go_together_and_what_is_impossible():
    with pytest.raises(ValueError, match="needs a selection that does so too, got Window"):
        Recipe(order=SortedSegments(), select=Window())
    with pytest.raises(ValueError, match=r"order\.segment must be three sizes"):
        SortedSegments(segment=(0, 4, 4))
    with pytest.raises(ValueError, match=r"order\.samples must be at least 1"):
        SortedSegments(samples=0)
    assert presets.pbs().select.top_p == 0.9
