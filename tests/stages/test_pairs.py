"""Masks by which queries see different keys, and key heads that several query heads share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.mask.pairs import PairMask
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate.none import NoCompensation
from dit_accel.stages.compensate.pooled_mass import PooledMass
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.order.sorted import SortedSegments
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import FullSelect, Window
from tests.calls import attend
from tests.properties.drawn import layouts, normal, seeds
from tests.stages.plan_oracle import attended

LAYOUT = TokenLayout((3, 4, 6), 5, 90)
ALL_STEPS = Schedule(dense_fraction=0.0)
SELECTS = (
    Pooled(density=0.3, block=(32, 32)),
    Mass(density=0.3, block=(64, 32)),
    Window(window=(1.0, 0.5, 0.5), block=(32, 32)),
    FullSelect(block=(32, 32)),
)
ORDERS = (Raster(), Tiles((2, 2, 4)), Curve(), SortedSegments(samples=8))


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, S, H, D) in float64; queries that see nothing give 0."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).nan_to_num(0.0).transpose(1, 2)


@given(st.sampled_from(SELECTS), st.sampled_from(ORDERS), layouts(4, extra=12, references=1), seeds, st.integers(0, 2))
def test_a_call_with_a_mask_of_pairs_is_what_its_plan_says(select, order, layout, seed: int, shape: int):
    if select.is_static and isinstance(order, SortedSegments):
        order = Raster()
    recipe = Recipe(order, select, schedule=ALL_STEPS)
    layout = layout if recipe.spans_references else layout.without_references()
    q, k, v = normal(seed, 3, 2, layout.seq_len, 2, 16)
    lead = ((), (2, 1), (1, 2))[shape]
    pairs = normal(seed + 1, *lead, layout.seq_len, layout.seq_len) > 0.3
    engine = Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    out = attend(engine, 0, AttentionInputs(q, k, v, pairs), layout, StepContext(), lambda: pytest.fail("ran dense"))
    plan = calls[0].plan
    expected = attended(recipe.compensate, plan, q, k, v)
    assert (out - expected).abs().max() <= 4e-6 * expected.abs().max().clamp_min(1)
    # The plan shows no hidden pair, and nothing is lost where all blocks are kept.
    if isinstance(select, FullSelect):
        want = dense(q, k, v, pairs if pairs.ndim == 4 else pairs[None, None])
        assert (out - want).abs().max() <= 4e-6 * want.abs().max().clamp_min(1)
    rows = torch.arange(layout.seq_len) if plan.rows is None else plan.rows.long()
    rows = rows.expand(2, 2, -1)
    slots = pairs.expand(2, 2, *pairs.shape[-2:]).take_along_dim(rows[..., None], 2)
    slots = slots.take_along_dim(rows[..., None, :], 3)
    assert not (plan.mask.to_tokens() & ~slots).any()


def test_sequences_packed_in_one_do_not_see_each_other():
    """Each part is as if it were alone, at full density; and a mask is cut once for all layers."""
    q, k, v = normal(0, 3, 1, 90, 2, 16)
    part = torch.arange(90) < 40
    recipe = Recipe(Tiles((2, 2, 4)), FullSelect(block=(32, 32)), schedule=ALL_STEPS)
    engine = Engine(recipe, ["a", "b"], "auto", 0)
    cuts = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PairMask, "of", _counted(PairMask.of, cuts))
        for layer in (0, 1):
            mask = part[:, None] == part
            out = attend(
                engine, layer, AttentionInputs(q, k, v, mask), LAYOUT, StepContext(), lambda: pytest.fail("ran dense")
            )
    assert len(cuts) == 1
    for side in (part, ~part):
        alone = dense(*(x[:, side] for x in (q, k, v)), None)
        assert (out[:, side] - alone).abs().max() <= 4e-6


def _counted(true, calls):
    def count(*args):
        calls.append(args)
        return true(*args)

    return count


def test_another_mask_in_the_next_forward_is_another_plan():
    q, k, v = normal(0, 3, 1, 90, 2, 16)
    engine = Engine(Recipe(Raster(), FullSelect(block=(32, 32)), schedule=ALL_STEPS), ["a"], "auto", 0)
    mask = torch.ones(90, 90, dtype=torch.bool).tril()
    for forward in range(3):
        mask = mask.clone() if forward == 1 else mask
        if forward == 2:
            mask.logical_not_().fill_diagonal_(True)  # the same tensor with another content
        step = StepContext(forward_id=forward)
        out = attend(engine, 0, AttentionInputs(q, k, v, mask), LAYOUT, step, lambda: pytest.fail("ran dense"))
        assert (out - dense(q, k, v, mask)).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("block", "compensate", "reason"),
    [
        (32, PooledMass(), "PooledMass cannot tell which blocks a mask of token pairs leaves out"),
        (16, NoCompensation(), "a mask of token pairs needs key blocks of a multiple of 32 tokens, got 16"),
    ],
    ids=["a compensation that cannot tell", "keys that fill no word of bits"],
)
def test_what_cannot_have_a_mask_of_pairs_stays_dense(block, compensate, reason):
    q, k, v = normal(0, 3, 1, 90, 2, 16)
    recipe = Recipe(Raster(), Pooled(block=(block, block)), compensate, schedule=ALL_STEPS)
    engine = Engine(recipe, ["a"], "auto", 0)
    mask = torch.ones(90, 90, dtype=torch.bool).tril()
    assert attend(engine, 0, AttentionInputs(q, k, v, mask), LAYOUT, StepContext(), lambda: v) is v
    assert list(engine.records[0].dense_calls) == [reason]


def test_means_stand_in_where_all_queries_see_the_same_keys():
    q, k, v = normal(0, 3, 1, 256, 2, 16)
    mask = torch.ones(256, 256, dtype=torch.bool).tril()
    layout, outs = TokenLayout((4, 8, 8), 0, 256), {}
    for name, compensate in (("means", PooledResidual()), ("nothing", NoCompensation())):
        recipe = Recipe(Raster(), Pooled(density=0.1, block=(32, 32)), compensate, schedule=ALL_STEPS)
        for seen in (mask, None):
            engine = Engine(recipe, ["a"], "auto", 0)
            given = AttentionInputs(q, k, v, seen)
            outs[name, seen is None] = attend(engine, 0, given, layout, StepContext(), lambda: pytest.fail("ran dense"))
    assert torch.equal(outs["means", False], outs["nothing", False])
    assert (outs["means", True] - outs["nothing", True]).abs().max() > 1e-3


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_queries_run_sparse_as_with_heads_of_their_own(select, groups):
    q, k, v = normal(0, 1, 2, 90, 4, 16)[0], *normal(1, 2, 2, 90, 4 // groups, 16)
    recipe = Recipe(Tiles((2, 2, 4)), select, schedule=ALL_STEPS)
    outs = []
    for keys, values in ((k, v), (k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))):
        engine = Engine(recipe, ["a"], "auto", 0)
        outs.append(
            attend(engine, 0, AttentionInputs(q, keys, values), LAYOUT, StepContext(), lambda: pytest.fail("ran dense"))
        )
    assert torch.equal(*outs)
    if isinstance(select, FullSelect):
        assert (outs[0] - dense(q, k, v, None)).abs().max() <= 4e-6


def test_gradients_reach_shared_heads():
    q, k, v = (x.requires_grad_() for x in (normal(0, 1, 1, 90, 4, 16)[0], *normal(1, 2, 1, 90, 2, 16)))
    recipe = Recipe(Raster(), FullSelect(block=(32, 32)), schedule=ALL_STEPS)
    engine = Engine(recipe, ["a"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, StepContext(), lambda: pytest.fail("ran dense"))
    weight = normal(2, *out.shape)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((dense(q, k, v, None) * weight).sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).abs().max() <= 2e-5


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("masked", ["", "keys", "pairs"])
def test_fewer_queries_than_keys(select, order, first, masked):
    """As if all tokens queried, for those that do; blocks of others are not read for."""
    layout = TokenLayout((3, 4, 6), first, 84, queries=(first, 72))
    q, k, v = normal(0, 3, 2, 84, 2, 16)
    mask = {"": None, "keys": normal(3, 2, 84) > -1, "pairs": normal(3, 84, 84) > -1}[masked]
    engine = Engine(Recipe(order, select, schedule=ALL_STEPS), ["a"], "auto", 0)
    calls = []
    engine.observer = calls.append
    some = slice(first, first + 72)
    given = mask[some] if masked == "pairs" else mask
    out = attend(
        engine, 0, AttentionInputs(q[:, some], k, v, given), layout, StepContext(), lambda: pytest.fail("ran dense")
    )
    assert out.shape == (2, 72, 2, 16)
    expected = attended(engine.recipe.compensate, calls[0].plan, calls[0].q, k, v, mask if masked == "keys" else None)
    assert (out - expected[:, some]).abs().max() <= 4e-6 * expected.abs().max()
    read = calls[0].plan.mask.kv_num_blocks
    if isinstance(order, Raster) and first and not masked:
        assert not read[..., : first // select.block[0]].any()
    if isinstance(select, FullSelect):
        sdpa_mask = {"": None, "keys": mask[:, None, None] if masked else None, "pairs": given}[masked]
        assert (out - dense(q[:, some], k, v, sdpa_mask)).abs().max() <= 4e-6
        if not masked:
            assert float(engine.records[0].density_sum) == pytest.approx(1.0, abs=0.35)
