"""Clipped softmax: its equation with gradients, in 8 bits, under masks of tokens, and its training."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.attention.clipped import clipping_change
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate.clipped import ClippedSoftmax
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.calls import attend
from tests.recipes import SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe

CLIPPED = Recipe(order=SMALL_TILES, select=Pooled(density=0.4, block=(32, 32)), compensate=ClippedSoftmax())
WINDOW = CLIPPED.with_fields({"select": "window", "select.window": (1.0, 0.5, 0.5), "select.block": (32, 32)})
LAYOUTS = [TokenLayout((3, 6, 9), 0, 162), TokenLayout((3, 6, 9), 11, 173), TokenLayout((3, 6, 9), 0, 175)]


def full_mask(length, partial=None):
    count = -(-length // 32)
    keep = torch.ones(1, 1, count, count, dtype=torch.bool)
    return BlockMask.from_dense(keep, 32, 32, length, length, partial=partial)


ALPHA = torch.tensor([0.7, 2.5])


def definition(q, k, v, alpha, zeta, seen):
    """The equation over pairs ``seen [B, H, S, S]``, (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    gamma = -alpha[:, None, None] / seen.sum(-1, keepdim=True)
    zero, one = torch.zeros((), dtype=weights.dtype), torch.ones((), dtype=weights.dtype)
    clipped = torch.minimum(torch.maximum((zeta - gamma) * weights + gamma, zero), one)
    return (torch.where(seen, clipped, zero) @ v).transpose(1, 2)


def seen_pairs(plan, q, key_mask):
    """bool ``[B, H, S, S]`` in the model's order, of what a plan keeps and a key mask shows."""
    batch, length, heads, _ = q.shape
    tokens = plan.mask.to_tokens().expand(batch, heads, length, length)
    rows = torch.arange(length) if plan.rows is None else plan.rows.long()
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            order = rows.expand(batch, heads, length)[b, h]
            seen[b, h, order[:, None], order[None]] = tokens[b, h]
    return seen if key_mask is None else seen & key_mask[:, None, None]


CASES = [
    (LAYOUTS[0], CLIPPED, True),
    (LAYOUTS[1], WINDOW, False),
    (LAYOUTS[2], CLIPPED, False),
    (LAYOUTS[2], WINDOW, True),
]


@pytest.mark.parametrize(("layout", "recipe", "hidden"), CASES)
def test_against_its_equation(layout, recipe, hidden):
    generator = torch.Generator().manual_seed(3)
    q, k, v, upstream = (torch.randn(2, layout.seq_len, 2, 64, generator=generator) for _ in range(4))
    q[:, ::3] *= 12  # of some queries one key has all weight
    key_mask = torch.rand(2, layout.seq_len, generator=generator) > 0.2 if hidden else None
    recipe = recipe.with_fields({"compensate.zeta": 1.03})
    engine = Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    inputs = [x.requires_grad_() for x in (q, k, v, ALPHA.clone())]
    engine.learned[0] = recipe.compensate.build(2, 64)
    out = attend(
        engine,
        0,
        AttentionInputs(*inputs[:3], key_mask),
        layout,
        StepContext(),
        lambda: pytest.fail("dense"),
        inputs[3:],
    )
    twins = [x.detach().double().requires_grad_() for x in inputs]
    wanted = definition(*twins, 1.03, seen_pairs(calls[0].plan, q, key_mask))
    plain = definition(*twins[:3], torch.zeros(2), 1.0, seen_pairs(calls[0].plan, q, key_mask))
    assert (wanted - plain).norm() > 0.1 * plain.norm()
    # A weight is as far off as its logit, which is rounded.
    largest = torch.einsum("bqhd,bkhd->bhqk", q, k).abs().max().item() / 8
    assert (out.double() - wanted).abs().max() <= 2 * torch.finfo(torch.float32).eps * largest * wanted.abs().max()
    found = torch.autograd.grad(out, inputs, upstream)
    for got, want in zip(found, torch.autograd.grad(wanted, twins, upstream.double()), strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_its_own_rounding(dtype):
    """The softmax and the bounds are in float32: no more is lost than by weights and values of half precision."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 161, 2, 64, generator=generator).to(dtype) for _ in range(3))
    mask = full_mask(161)
    seen = torch.ones(1, 2, 161, 161, dtype=torch.bool)
    got = clipping_change(q, k, v, mask, ALPHA)
    exact = [x.double() for x in (q, k, v)]
    wanted = definition(*exact, ALPHA.double(), 1.0, seen) - definition(*exact, torch.zeros(2), 1.0, seen)
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "int8_int8"])
def test_in_8_bits_the_error_is_that_of_the_softmax(precision):
    layout = LAYOUTS[2]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, layout.seq_len, 2, 64, generator=generator) for _ in range(3))

    def run(precision, alpha):
        recipe = CLIPPED.with_fields({"precision": precision})
        engine = Engine(recipe, ["layer"], "auto", 0)
        engine.learned[0] = recipe.compensate.build(2, 64)
        inputs = AttentionInputs(q, k, v)
        return attend(engine, 0, inputs, layout, StepContext(), lambda: pytest.fail("dense"), [alpha]).double()

    none = torch.zeros(2)
    error = run(precision, none) - run("model", none)
    assert error.norm() > 1e-3 * run("model", none).norm()
    torch.testing.assert_close(run(precision, ALPHA) - run("model", ALPHA), error, rtol=0, atol=1e-5)


def test_a_head_below_its_bound_comes_back():
    """A number below 0 is 0, and has the gradient of 0, so that it is not stuck there."""
    generator = torch.Generator().manual_seed(6)
    q, k, v, upstream = (torch.randn(1, 64, 2, 32, generator=generator) for _ in range(4))
    mask = full_mask(64)
    layout = TokenLayout((1, 8, 8), 0, 64)
    recipe = CLIPPED.with_fields({"select": "full", "select.block": (32, 32)})
    found = []
    for value in (0.0, -0.5):
        engine = Engine(recipe, ["layer"], "auto", 0)
        alpha = torch.full((2,), value, requires_grad=True)
        engine.learned[0] = recipe.compensate.build(2, 32)
        out = attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: pytest.fail("dense"), [alpha])
        found.append((out.detach(), *torch.autograd.grad(out, alpha, upstream)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().min() > 0
    twin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    # Just inside the bound, where the equation has a gradient.
    seen = mask.to_tokens().expand(1, 2, 64, 64)
    wanted = definition(q.double(), k.double(), v.double(), twin + 1e-9, 1.0, seen)
    torch.testing.assert_close(
        found[0][1].double(), torch.autograd.grad(wanted, twin, upstream.double())[0], rtol=1e-4, atol=1e-6
    )


def test_a_mask_of_pairs_is_clipped_over_what_each_query_sees():
    layout = LAYOUTS[0]
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, layout.seq_len, 2, 32, generator=generator) for _ in range(3))
    pairs = torch.rand(1, 1, layout.seq_len, layout.seq_len, generator=generator) > 0.4
    recipe = Recipe(select=Window((1.0, 1.0, 1.0), block=(32, 32)), compensate=ClippedSoftmax())
    engine = Engine(recipe, ["layer"], "auto", 0)
    engine.learned[0] = recipe.compensate.build(2, 32)
    inputs = AttentionInputs(q, k, v, pairs)
    out = attend(engine, 0, inputs, layout, StepContext(), lambda: pytest.fail("dense"), [ALPHA])
    wanted = definition(q.double(), k.double(), v.double(), ALPHA.double(), 1.0, pairs.expand(1, 2, -1, -1))
    assert (out.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max()


def test_queries_that_see_nothing_give_nothing():
    q = torch.randn(1, 64, 2, 32, generator=torch.Generator().manual_seed(8))
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    mask = full_mask(64, partial=torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert not clipping_change(q, q, q, mask, ALPHA, key_mask=hidden).any()
    with pytest.raises(ValueError, match=r"one number for each of 2 heads, got \(3,\)"):
        clipping_change(q, q, q, mask, torch.ones(3))


def test_untrained_it_changes_nothing_and_trained_it_comes_back(tmp_path):
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, CLIPPED.with_fields({"compensate": "none"})):
        plain = TINY["wan"].run(pipe, steps=2)
    with dit_accel.patch(pipe, CLIPPED):
        assert torch.equal(TINY["wan"].run(pipe, steps=2), plain)
    config = FinetuneConfig(steps=3, learning_rate=0.5, train="learned", evaluate_samples=1)
    result = finetune(pipe, CLIPPED.with_fields({"precision": "int8"}), samples(2), tmp_path, config)
    clipped = TINY["wan"].run(pipe, steps=2)
    assert (clipped - plain).abs().max() > 1e-3
    result.handle.remove()
    with dit_accel.load_adapter(pipe, result.adapter):
        assert torch.equal(TINY["wan"].run(pipe, steps=2), clipped)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be at least 0, got -1\.0"):
        ClippedSoftmax(alpha=-1.0)
    with pytest.raises(ValueError, match=r"zeta must be at least 1, got 0\.9"):
        ClippedSoftmax(zeta=0.9)
    with pytest.raises(ValueError, match="a dense selection runs the model's own"):
        Recipe(compensate=ClippedSoftmax())
