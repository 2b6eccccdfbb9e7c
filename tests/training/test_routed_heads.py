"""Heads routed by blocks of queries: what runs, from loops; what is skipped is not read; gradients and training."""

from __future__ import annotations

import math

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate.routed_heads import RoutedHeads
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.select.pooled import Pooled
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.calls import attend
from tests.recipes import SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe

HEADS = 4
ROUTED = Recipe(order=SMALL_TILES, select=Pooled(density=0.5, block=(32, 32)), compensate=RoutedHeads(0.5))
LAYOUTS = [TokenLayout((3, 6, 9), 0, 162), TokenLayout((3, 6, 9), 11, 173), TokenLayout((3, 6, 9), 0, 175)]


def run(recipe, layout, inputs, gate):
    """Output, and the call as the engine's plan was for it."""
    engine = Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    given = None if gate is None else [gate]
    out = attend(engine, 0, AttentionInputs(*inputs), layout, StepContext(), lambda: pytest.fail("dense"), given)
    return out, calls[0].plan, engine


def heads_that_run(q, gate, layout, rows, kept):
    """bool ``[B, H, S]`` in the model's order: which heads of each token's block run, from loops."""
    batch, length, heads, _ = q.shape
    told = gate.detach()
    first, last = layout.latent_start, layout.latent_start + layout.num_latent
    runs = torch.ones(batch, heads, length, dtype=torch.bool)
    for b in range(batch):
        for begin in range(0, length, 32):
            tokens = rows[begin : begin + 32]
            if any(not first <= t < last for t in tokens):
                continue
            total = [0.0] * heads
            for t in tokens:
                sizes = [float(q[b, t, h].norm()) for h in range(heads)]
                weights = [math.exp(float(told[b, t - first, h])) * sizes[h] for h in range(heads)]
                total = [a + w / sum(weights) for a, w in zip(total, weights)]
            best = sorted(range(heads), key=lambda h: -total[h])[: math.ceil(kept * heads)]
            for h in range(heads):
                runs[b, h, tokens] = h in best
    return runs


@pytest.mark.parametrize("layout", LAYOUTS, ids=["alone", "text first", "text last"])
def test_against_loops(layout):
    generator = torch.Generator().manual_seed(3)
    q, k, v, upstream = (torch.randn(2, layout.seq_len, HEADS, 32, generator=generator).double() for _ in range(4))
    gate = torch.randn(2, layout.num_latent, HEADS, 1, generator=generator).double().requires_grad_()
    v.requires_grad_()
    out, plan, engine = run(ROUTED, layout, (q, k, v), gate)
    plain, whole, _ = run(ROUTED.with_fields({"compensate": "none"}), layout, (q, k, v), None)
    rows = plan.rows[0, 0].tolist()
    runs = heads_that_run(q, gate, layout, rows, 0.5)
    assert 0.3 < runs.float().mean() < 1.0
    assert len({tuple(row.tolist()) for row in runs[0].T}) > 2  # blocks differ in the heads that they run
    first, last = layout.latent_start, layout.latent_start + layout.num_latent
    sizes = q[:, first:last].norm(dim=-1)
    share = torch.exp(gate[..., 0]) * sizes
    share = share / share.sum(-1, keepdim=True)
    factor = torch.ones(2, layout.seq_len, HEADS, dtype=torch.float64)
    factor[:, first:last] = 1 + HEADS * (share - share.detach())
    wanted = plain * (factor * runs.transpose(1, 2))[..., None]
    assert (out - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    found = torch.autograd.grad(out, (gate, v), upstream)
    for got, want in zip(found, torch.autograd.grad(wanted, (gate, v), upstream), strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert float(plan.mask.density()) < float(whole.mask.density())
    assert float(engine.records[0].density_sum) == pytest.approx(float(plan.mask.density()))


def test_what_is_skipped_is_not_read():
    layout = LAYOUTS[0]
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, layout.seq_len, HEADS, 32, generator=generator) for _ in range(3))
    gate = torch.zeros(1, layout.num_latent, HEADS, 1)
    gate[:, :, 1] = -9.0
    v[:, :, 1] = float("nan")
    q[:, :, 1] = 1e-3  # no token's query makes up for it
    out, plan, engine = run(ROUTED.with_fields({"compensate.kept": 0.75}), layout, (q, k, v), gate)
    assert not plan.mask.kv_num_blocks[:, 1].any()
    assert not out[:, :, 1].any()
    assert out[:, :, 0].abs().min() > 0
    assert not bool(engine.records[0].nan_calls)


def test_a_plan_that_is_kept_is_narrowed_for_each_call():
    """A router's choice belongs to its call, not to the plan."""
    layout = LAYOUTS[0]
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(1, layout.seq_len, HEADS, 32, generator=generator) for _ in range(3)]
    engine = Engine(ROUTED.with_fields({"schedule.refresh_every": 9}), ["layer"], "auto", 0)
    for index, favourite in enumerate((0, 3)):
        gate = torch.zeros(1, layout.num_latent, HEADS, 1)
        gate[:, :, favourite] = 9.0
        step = StepContext(index=index, num_steps=9, sigma=1 - index / 9, forward_id=index)
        out = attend(engine, 0, AttentionInputs(*inputs), layout, step, lambda: pytest.fail("dense"), [gate])
        assert out[:, :, favourite].abs().min() > 0
    assert engine.records[0].plans_made == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"kept must lie in \(0, 1\], got 0\.0"):
        RoutedHeads(0.0)
    with pytest.raises(ValueError, match="a dense selection runs the model's own"):
        Recipe(compensate=RoutedHeads())
    layout = LAYOUTS[0]
    inputs = [torch.randn(1, layout.seq_len, HEADS, 32) for _ in range(3)]
    orders = AxisOrder((("fhw", "whf", "fhw", "hfw"),))
    recipe = Recipe(order=orders, select=ROUTED.select, compensate=RoutedHeads())
    with pytest.raises(ValueError, match="use an order that all heads share"):
        run(recipe, layout, inputs, torch.zeros(1, layout.num_latent, HEADS, 1))


def test_all_heads_change_nothing_and_a_trained_router_comes_back(tmp_path):
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, ROUTED.with_fields({"compensate": "none"})):
        plain = TINY["wan"].run(pipe, steps=2)
    with dit_accel.patch(pipe, ROUTED.with_fields({"compensate.kept": 1.0})):
        assert torch.equal(TINY["wan"].run(pipe, steps=2), plain)
    config = FinetuneConfig(steps=3, learning_rate=0.5, train="learned", evaluate_samples=1)
    with dit_accel.patch(pipe, ROUTED):
        untrained = TINY["wan"].run(pipe, steps=2)
    assert (untrained - plain).abs().max() > 1e-3
    result = finetune(pipe, ROUTED, samples(2), tmp_path, config)
    routed = TINY["wan"].run(pipe, steps=2)
    assert (routed - untrained).abs().max() > 1e-3
    result.handle.remove()
    with dit_accel.load_adapter(pipe, result.adapter):
        assert torch.equal(TINY["wan"].run(pipe, steps=2), routed)
