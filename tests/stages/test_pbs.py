"""Segmented permutation against its definition, and selections on an order per batch item and head."""

import itertools

import numpy as np
import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.quality.inspect_pipeline import _observations
from dit_accel.run import Run
from dit_accel.stages.order.sorted import SortedSegments
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.calls import attend, call_of
from tests.stages.block_oracle import LAYOUTS, best, fewest, half_hidden, inputs, per_head, selected, views
from tests.stages.oracle import masked_attention

SEGMENT = (2, 4, 4)


TILE = (1, 2, 2)


def _expected(layout, q, k, key_mask, samples):
    """Rows ``[S]`` and keys ``[B, H, S]`` by their words: queries by tile and place, keys by segment and falling
    attention, one after the other in the places of the keys that are seen."""
    segment = SEGMENT if layout.grid[0] > 1 else (1, 8, 4)
    places = list(itertools.product(*map(range, layout.grid)))
    count = min(samples, len(places))
    sample = [layout.latent_start + int((n + 0.5) * len(places) / count) for n in range(count)]
    latents = range(layout.latent_start, layout.latent_start + len(places))
    others = [token for token in range(layout.seq_len) if token not in latents]

    def part(n, size):
        return [x // one for x, one in zip(places[n], size, strict=True)]

    order = sorted(range(len(places)), key=lambda n: (part(n, TILE), places[n]))
    rows = torch.tensor([layout.latent_start + n for n in order] + others, dtype=torch.int32)
    batch, _, heads, dim = q.shape
    keys = torch.arange(layout.seq_len).repeat(batch, heads, 1)
    for b, h in np.ndindex(batch, heads):
        seen = np.ones(layout.seq_len, bool) if key_mask is None else key_mask[b].numpy()
        logits = q[b, sample, h].double().numpy() @ k[b, :, h].double().numpy().T / dim**0.5
        logits[:, ~seen] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        score = (weights / weights.sum(1, keepdims=True)).mean(0)
        free = [layout.latent_start + n for n in order if seen[layout.latent_start + n]]
        ranked = sorted(free, key=lambda token: (part(token - layout.latent_start, segment), -score[token]))
        keys[b, h, free] = torch.tensor(ranked, dtype=torch.long)
    return rows, keys.to(torch.int32)


@pytest.mark.parametrize("hidden", ["nothing", "text", "latents"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("samples", [7, 1000])
def test_keys_of_segments_are_sorted_by_sampled_attention(samples, name, hidden):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    key_mask = None
    if hidden == "text" and layout.latent_start == 0 and layout.num_extra:
        key_mask = half_hidden(layout)
    elif hidden == "latents":
        key_mask = torch.rand(2, layout.seq_len, generator=torch.Generator().manual_seed(1)) > 0.3
    order, call = SortedSegments(SEGMENT, samples, TILE), call_of(q, k, key_mask=key_mask)
    rows, keys = _expected(layout, q, k, key_mask, samples)
    assert torch.equal(order.rows_of_call(layout, call), rows)
    assert torch.equal(order.keys_of_call(layout, call), keys)


def _moved(x, keys):
    """(B, S, H, D) with each token's key in its new place."""
    return x.gather(1, keys.long().transpose(1, 2)[..., None].expand_as(x))


@pytest.mark.parametrize("name", LAYOUTS)
def test_selections_on_the_sorted_keys(name):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout)
    order, call = SortedSegments(SEGMENT, 16, TILE), call_of(q, k, key_mask=key_mask)
    rows, keys = order.rows_of_call(layout, call), order.keys_of_call(layout, call)
    k = _moved(k, keys)
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


def _visible(layout, q, k, select):
    """bool ``[B, H, S, S]``: which keys the blocks of a selection show each query, in the model's order."""
    order = SortedSegments(SEGMENT, 16, TILE)
    rows, keys = order.rows_of_call(layout, call_of(q, k)).long(), order.keys_of_call(layout, call_of(q, k)).long()
    keep = selected(select, layout, rows, q, _moved(k, keys))
    mask = torch.zeros(2, 3, layout.seq_len, layout.seq_len, dtype=torch.bool)
    for b, h in np.ndindex(2, 3):
        tokens = keep[b, h].repeat_interleave(32, 0).repeat_interleave(32, 1)
        mask[b, h][rows[:, None], keys[b, h, rows]] = tokens[: layout.seq_len, : layout.seq_len]
    return mask


@pytest.mark.parametrize("name", ["alone", "text first", "text last"])
def test_the_engine_runs_on_the_keys_of_the_call(name):
    """Output and gradients of what the blocks show, with keys where the model has them."""
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    recipe = Recipe(order=SortedSegments(SEGMENT, 16, TILE), select=Pooled(density=0.3, block=(32, 32)))
    engine = Engine(recipe, ["layer"], "auto", 0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(engine, 0, AttentionInputs(*leaves), layout, StepContext(), lambda: q)
    twins = [x.double().requires_grad_() for x in (q, k, v)]
    shown = _visible(layout, q, k, recipe.select)
    assert shown.double().mean() < 0.9
    expected = masked_attention(*twins, shown)
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    wanted = torch.autograd.grad(expected, twins, upstream.double())
    for label, grad, want in zip("qkv", torch.autograd.grad(out, leaves, upstream), wanted):
        assert (grad - want).abs().max() <= 1e-5 * want.abs().max(), label


def test_a_kept_plan_moves_the_keys_of_later_steps():
    layout = LAYOUTS["alone"]
    q, k = inputs(layout)
    later, v = (torch.randn(q.shape, generator=torch.Generator().manual_seed(n)) for n in (3, 4))
    recipe = Recipe(
        order=SortedSegments(SEGMENT, 16, TILE),
        select=Pooled(density=0.3, block=(32, 32)),
        schedule=Schedule(refresh_every=4),
    )
    engine = Engine(recipe, ["layer"], "auto", 0)
    for index, keys in enumerate((k, later)):
        step = StepContext(index=index, num_steps=4, forward_id=index)
        out = attend(engine, 0, AttentionInputs(q, keys, v), layout, step, lambda: pytest.fail("ran dense"))
    assert engine.records[0].plans_made == 1
    expected = masked_attention(q, later, v, _visible(layout, q, k, recipe.select))
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_what_looks_at_a_plan_finds_the_keys_in_their_places():
    """An inspection says what mass a plan keeps."""
    layout = LAYOUTS["alone"]
    q, k = inputs(layout)
    recipe = Recipe(order=SortedSegments(SEGMENT, 16, TILE), select=Pooled(density=0.3, block=(32, 32)))
    engine, calls = Engine(recipe, ["layer"], "auto", 0), []
    engine.observer = calls.append
    attend(engine, 0, AttentionInputs(q, k, k), layout, StepContext(), lambda: pytest.fail("ran dense"))
    shown = _visible(layout, q, k, recipe.select)
    weights = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()).div(q.shape[-1] ** 0.5).softmax(-1)
    kept = float((weights * shown).sum(-1).mean())
    (found,) = [seen.pattern.recall for seen in _observations(calls[0], 0) if seen.order == "recipe"]
    assert float(found.mean()) == pytest.approx(kept, abs=1e-5)
    assert torch.equal(calls[0].k, k), "the call itself keeps its keys"


def test_under_a_mask_of_pairs_no_key_moves():
    layout = LAYOUTS["alone"]
    q, k = inputs(layout)
    pairs = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool).tril()
    call = AttentionCall.of(0, AttentionInputs(q, k, k, pairs), layout, StepContext(), Run())
    assert SortedSegments(SEGMENT).keys_of_call(layout, call) is None


def test_what_does_not_go_together_and_what_is_impossible():
    with pytest.raises(ValueError, match="needs a selection that does so too, got Window"):
        Recipe(order=SortedSegments(), select=Window())
    with pytest.raises(ValueError, match=r"order\.segment must be three sizes"):
        SortedSegments(segment=(0, 4, 4))
    with pytest.raises(ValueError, match=r"order\.samples must be at least 1"):
        SortedSegments(samples=0)
    with pytest.raises(ValueError, match=r"order\.tile must be three sizes"):
        SortedSegments(tile=(0, 1, 1))
    assert presets.pbs().select.top_p == 0.9
