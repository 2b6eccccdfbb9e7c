"""What plans left out in dense steps, added again: against the equation, in float64."""

import itertools
import math

import pytest
import torch

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.frozen_planner import FrozenPlanner
from dit_accel.layout import LatentGrid, StepContext, TokenLayout
from dit_accel.plan import LeftOut
from dit_accel.run import Run
from dit_accel.stages.compensate.carried import Carried
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden
from tests.tiny import TINY

BLOCK = (32, 32)
STEPS, LASTS = 10, 0.5
# Dense: the dense phase of two steps, whose last has the plan, and the step at 0.7.
SCHEDULE = Schedule(dense_fraction=0.2, refresh_at=(0.0, 0.7), dense_refresh=True, plan_in_dense_phase=True)
SELECTS = {
    "pooled": Pooled(density=0.3, block=BLOCK),
    "mass": Mass(density=0.3, block=BLOCK),
    "window": Window(window=(1, 3, 3), block=BLOCK),
}

MORE = {
    "references": TokenLayout((1, 8, 9), 6, 150, (LatentGrid((1, 5, 6), 78), LatentGrid((1, 6, 7), 108))),
    "ragged": TokenLayout((3, 7, 9), 5, 196),
}


def _inputs(layout: TokenLayout, index: int, branch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * branch + index)
    return [torch.randn(2, layout.seq_len, 3, 16, generator=generator).to(dtype) for _ in range(3)]


def _with_means(q, k, v, plan, layout: TokenLayout, visible: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) in float64: one softmax over the visible keys of the kept blocks and a mean of each other block."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    slots = torch.arange(layout.seq_len).expand(2, 3, -1)
    slots = slots if plan.rows is None else plan.rows.long().expand(2, 3, -1)
    kept = plan.mask.to_dense().expand(2, 3, -1, -1)
    out = torch.zeros_like(q)
    for b, h in itertools.product(range(2), range(3)):
        for i, asking in enumerate(slots[b, h].split(BLOCK[0])):
            keys, values, weight = [], [], []
            for j, block in enumerate(slots[b, h].split(BLOCK[1])):
                members = block[visible[b, 0, 0, block].expand(len(block))]
                if len(members):
                    key, value, alone = k[b, h, members], v[b, h, members], bool(kept[b, h, i, j])
                    keys.append(key if alone else key.mean(0, keepdim=True))
                    values.append(value if alone else value.mean(0, keepdim=True))
                    weight.append(torch.full((len(keys[-1]),), len(members) / len(keys[-1]), dtype=torch.float64))
            logits = q[b, h, asking] @ torch.cat(keys).T / math.sqrt(q.shape[-1]) + torch.cat(weight).log()
            out[b, h, asking] = logits.softmax(-1) @ torch.cat(values)
    return out.transpose(1, 2)


def _attention(q, k, v, seen=None) -> torch.Tensor:
    """(B, S, H, D) in float64; ``seen`` bool ``[B|1, H|1, S, S]``."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if seen is not None:
        logits = logits.masked_fill(~seen, -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def _seen(plan, layout: TokenLayout) -> torch.Tensor:
    """bool ``[B, H, S, S]``: the token pairs that a plan reads, in the model's order."""
    dense = plan.mask.to_dense().repeat_interleave(BLOCK[0], 2).repeat_interleave(BLOCK[1], 3)
    dense = dense[..., : layout.seq_len, : layout.seq_len].expand(2, 3, -1, -1)
    if plan.rows is None:
        return dense
    slot = plan.rows.long().expand(2, 3, -1).argsort(-1)
    rows = slot[..., None].expand_as(dense)
    return dense.gather(2, rows).gather(3, slot[..., None, :].expand_as(dense))


@pytest.mark.parametrize(
    ("kind", "name", "hidden", "order", "dtype", "bits", "means"),
    [
        ("pooled", "alone", False, Raster(), torch.float32, 16, False),
        ("pooled", "text first", True, Tiles((2, 4, 4)), torch.float32, 16, False),
        ("mass", "text last", True, Tiles((2, 4, 4)), torch.float32, 16, False),
        ("mass", "text first", False, Tiles((2, 4, 4)), torch.bfloat16, 16, False),
        ("mass", "references", True, Tiles((2, 4, 4)), torch.float32, 16, False),
        ("pooled", "ragged", True, Tiles((2, 4, 4)), torch.float32, 16, False),
        ("mass", "ragged", False, Tiles((2, 4, 4)), torch.float32, 8, False),
        ("pooled", "text first", True, Tiles((2, 4, 4)), torch.bfloat16, 8, False),
        ("pooled", "text first", True, Tiles((2, 4, 4)), torch.float32, 16, True),
        ("mass", "ragged", False, Tiles((2, 4, 4)), torch.float32, 8, True),
        ("mass", "references", True, Raster(), torch.bfloat16, 16, True),
    ],
    ids=[
        *("plain", "pooled", "mass", "bfloat16", "references", "ragged", "8 bits", "8 bits, bfloat16"),
        *("over means", "over means, ragged, 8 bits", "over means, references, bfloat16"),
    ],
)
def test_the_equation(kind, name, hidden, order, dtype, bits, means):
    """Two branches in turns: dense less sparse attention of the last dense step, times 1 - age / lasts."""
    layout = (LAYOUTS | MORE)[name]
    recipe = Recipe(order, SELECTS[kind], Carried(LASTS, bits, means), schedule=SCHEDULE)
    engine = Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    key_mask = half_hidden(layout) if hidden else None
    visible = torch.ones(2, layout.seq_len, dtype=torch.bool) if key_mask is None else key_mask
    visible = visible[:, None, None]

    def planned(q, k, v, plan) -> torch.Tensor:
        if means:
            return _with_means(q, k, v, plan, layout, visible)
        return _attention(q, k, v, _seen(plan, layout) & visible)

    left_out, added, largest = {}, 0, 0.0
    for index in range(STEPS):
        for branch in range(2):
            q, k, v = _inputs(layout, index, branch, dtype)
            dense = _attention(q, k, v, visible)
            step = StepContext(index, STEPS, None, f"#{branch}", forward_id=2 * index + branch)
            before = engine.records[0].sparse_calls
            inputs = AttentionInputs(q, k, v, key_mask)
            out = attend(engine, 0, inputs, layout, step, lambda dense=dense: dense.to(dtype))
            kept = engine.run.kept(layout, key_mask, step.forward_id)
            if index in (0, 1, 7):
                assert engine.records[0].sparse_calls == before
                assert torch.equal(out, dense.to(dtype))
                if index:
                    left = kept.memories[(0, step.branch, 2, q.device)].left_out
                    assert left.difference.dtype == (torch.int8 if bits == 8 else dtype)
                    plan = kept.plans[(0, step.branch, 2, q.device)].plan
                    sparse = planned(q, k, v, plan)
                    left_out[branch] = (index, dense - sparse)
                continue
            assert engine.records[0].sparse_calls == before + 1
            made, difference = left_out[branch]
            share = max(0.0, 1.0 - (index - made) / STEPS / LASTS)
            sparse = planned(q, k, v, calls[-1].plan)
            expected = sparse + share * difference
            added += share > 0
            # Each of the three terms rounds once to the dtype (bfloat16: 2^-9 of its size), the kernel likewise.
            bound = {torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-8}[dtype] * expected.abs().max()
            # Half a step of 127 of the largest of a token and head.
            rounded = share * difference.abs().amax(-1, keepdim=True) / 254 if bits == 8 else torch.zeros(1)
            assert ((out.double() - expected).abs() - rounded).max() <= bound
            if bits == 8 and share and dtype == torch.float32:
                assert (out.double() - expected).abs().max() > bound, "it is not in 8 bits"
            largest = max(largest, float((share * difference).abs().max() / expected.abs().max()))
    assert added == 2 * (4 + 2)
    assert largest > 0.1, "nothing that shows was added"
    assert engine.records[0].nan_calls == 0


def test_a_window_has_dense_steps_too():
    """Static plans: the dense phase's last step and the one at 0.7 are dense, and their difference is added."""
    layout = LAYOUTS["alone"]
    recipe = Recipe(Tiles((2, 4, 4)), SELECTS["window"], Carried(LASTS), schedule=SCHEDULE)
    engine = Engine(recipe, ["layer"], "auto", 0)
    plain = Engine(recipe.with_fields({"compensate": "none"}), ["layer"], "auto", 0)
    did, left_out = [], None
    for index in range(STEPS):
        q, k, v = _inputs(layout, index, 0, torch.float32)
        step = StepContext(index, STEPS, None, None, forward_id=index)
        dense = _attention(q, k, v)
        inputs = AttentionInputs(q, k, v)
        before = engine.records[0].sparse_calls
        out = attend(engine, 0, inputs, layout, step, lambda dense=dense: dense.float())
        did.append(engine.records[0].sparse_calls > before)
        bare = StepContext(None, None, None, None, forward_id=index)
        sparse = attend(plain, 0, inputs, layout, bare, lambda: pytest.fail("ran dense")).double()
        if not did[-1]:
            left_out = (index, dense - sparse)
        else:
            share = max(0.0, 1.0 - (index - left_out[0]) / STEPS / LASTS)
            assert (out.double() - sparse - share * left_out[1]).abs().max() <= 1e-5
    assert did == [False, False, True, True, True, True, True, False, True, True]
    assert dict(engine.records[0].dense_calls) == {"dense phase": 1, "search step": 2}


def test_a_new_run_and_a_bare_model_carry_nothing():
    layout = LAYOUTS["alone"]
    recipe = Recipe(Raster(), SELECTS["window"], Carried(), schedule=SCHEDULE)
    engine = Engine(recipe, ["layer"], "auto", 0)
    plain = Engine(recipe.with_fields({"compensate": "none"}), ["layer"], "auto", 0)

    def out_of(engine: Engine, step: StepContext) -> torch.Tensor:
        q, k, v = _inputs(layout, 3, 0, torch.float32)
        return attend(engine, 0, AttentionInputs(q, k, v), layout, step, lambda: torch.full_like(q, 1e3))

    out_of(engine, StepContext(1, STEPS, forward_id=1))
    bare = StepContext(forward_id=9)
    assert torch.equal(out_of(engine, bare), out_of(plain, bare))
    engine.run = Run()
    assert torch.equal(out_of(engine, StepContext(3, STEPS, forward_id=3)), torch.full((2, 189, 3, 16), 1e3))


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_eight_bits_lose_half_a_step_whatever_the_dtype(dtype, size, device):
    """And one rounding of the output: a scale in half precision would lose as much again, or all of it."""
    generator = torch.Generator().manual_seed(0)
    difference, out = (torch.randn(2, 9, 2, 16, generator=generator).mul(size).to(device, dtype) for _ in range(2))
    difference[0, 0] = 0.0
    expected = out.double() + 0.7 * difference.double()
    rounded = 0.7 * difference.double().abs().amax(-1, keepdim=True) / 254
    whole = out.clone()
    LeftOut.of(StepContext(), difference, 8).add_to(out, 0.7)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    # The scale itself is float32.
    rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-20 * rounded + smallest
    assert ((out.double() - expected).abs() - rounded <= rounding).all()
    assert torch.equal(out[0, 0], whole[0, 0])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_nan_of_the_difference_shows(bits):
    layout = LAYOUTS["alone"]
    engine = Engine(Recipe(Raster(), SELECTS["pooled"], Carried(bits=bits), schedule=SCHEDULE), ["layer"], "auto", 0)
    for index in (1, 2):
        q, k, v = _inputs(layout, index, 0, torch.float32)
        step = StepContext(index, STEPS, forward_id=index)
        attend(engine, 0, AttentionInputs(q, k, v), layout, step, lambda v=v: torch.full_like(v, math.nan))
    assert engine.records[0].nan_calls == 1


def test_two_pipelines_and_a_second_run():
    """A run's differences are its own: the same prompt again, after another, gives the same bits."""
    tiny = TINY["wan"]
    recipe = Recipe(Tiles((2, 2, 2)), Window(window=(1, 1, 1), block=BLOCK), Carried(), schedule=SCHEDULE)
    pipe, other = tiny.build(), tiny.build()
    with dit_accel.patch(pipe, recipe) as handle, dit_accel.patch(other, recipe):
        first = tiny.run(pipe)
        tiny.run(other)
        assert torch.equal(tiny.run(pipe), first)
        assert handle.summary().dense_calls["search step"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule.dense_refresh": False, "schedule.plan_in_dense_phase": False}, "needs dense steps now and then"),
        ({"schedule.refresh_at": ()}, "needs dense steps now and then"),
        ({"compensate.lasts": 0.0}, r"compensate.lasts must be a share of the steps in \(0, 1\], got 0.0"),
        ({"compensate.means": True, "select": "window"}, r"compensate\.means: .*Window also hides single tokens"),
        ({"compensate.bits": 4}, "compensate.bits must be 8 or 16, got 4"),
        ({"compensate.lasts": 1.5}, "got 1.5"),
        ({"select": "dense"}, "a dense selection leaves nothing out"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    recipe = Recipe(Raster(), SELECTS["pooled"], Carried(), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=message):
        recipe.with_fields(changes)


def test_blocks_chosen_anew_are_refused():
    with pytest.raises(ValueError, match=r"schedule\.choose_every changes the plan"):
        presets.ear().with_fields({"compensate": "carried", "schedule.choose_every": 1})


def test_a_calibration_is_refused():
    recipe = Recipe(Raster(), SELECTS["pooled"], Carried(), schedule=SCHEDULE)
    with pytest.raises(ValueError, match="a calibration has made its plans"):
        FrozenPlanner(recipe, None)


def test_it_has_no_gradient():
    layout = LAYOUTS["alone"]
    engine = Engine(Recipe(Raster(), SELECTS["window"], Carried(), schedule=SCHEDULE), ["layer"], "auto", 0)
    q, k, v = _inputs(layout, 0, 0, torch.float32)
    attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(1, STEPS, forward_id=1), lambda: v)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="Carried has no gradient"):
        attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(2, STEPS, forward_id=2), lambda: v)


def test_means_leave_less_to_carry():
    """Keys alike in a block, as smooth latents have them: most of what a plan leaves out, its means have."""
    layout = LAYOUTS["even"]
    q, k, v = _inputs(layout, 0, 0, torch.float32)
    k = k.view(2, 4, 32, 3, 16)[:, :, :1].expand(2, 4, 32, 3, 16).reshape(k.shape) + 0.2 * k
    dense, size = _attention(q, k, v).float(), {}
    for means in (False, True):
        recipe = Recipe(Raster(), SELECTS["pooled"], Carried(means=means), schedule=SCHEDULE)
        engine = Engine(recipe, ["layer"], "auto", 0)
        step = StepContext(1, STEPS, forward_id=1)
        attend(engine, 0, AttentionInputs(q, k, v), layout, step, lambda: dense)
        (memory,) = engine.run.kept(layout, None, 1).memories.values()
        size[means] = float(memory.left_out.difference.norm())
    assert size[True] < 0.5 * size[False]
