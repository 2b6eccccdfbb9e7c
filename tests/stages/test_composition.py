"""Axes chosen freely: AdaSpa's selection, on PARO's orders, in INT8, with a pooled residual."""

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.precision import Int8
from dit_accel.stages.select.mass import Mass
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs
from tests.stages.plan_oracle import assert_attends, attended

BLOCK = (32, 32)
ORDER = AxisOrder((("whf", "fhw", "hfw"), ("fwh", "wfh", "hwf")))
RECIPE = Recipe(order=ORDER, select=Mass(density=0.3, block=BLOCK), compensate=PooledResidual(), precision=Int8())


def _attend(recipe, layout, q, k, v, key_mask, layer=1):
    engine = Engine(recipe, ["first", "second"], "auto", 0)
    calls = []
    engine.observer = calls.append
    out = attend(
        engine, layer, AttentionInputs(q, k, v, key_mask), layout, StepContext(), lambda: pytest.fail("ran dense")
    )
    return out, calls[0].plan


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_adaspa_on_paro_orders_in_int8_with_a_residual(name, hidden):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(8))
    key_mask = half_hidden(layout) if hidden else None
    out, plan = _attend(RECIPE, layout, q, k, v, key_mask)
    exact, same = _attend(RECIPE.with_fields({"precision": "model"}), layout, q, k, v, key_mask)
    assert torch.equal(plan.mask.to_dense(), same.mask.to_dense())
    assert torch.equal(plan.rows[0], ORDER.rows(layout, q.device, 1))
    expected = attended(PooledResidual(), plan, q, k, v, key_mask)
    assert (exact.double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    # Half a step of 1/127 in q and in k, over logits of up to some tens.
    difference = (out.double() - expected).norm() / expected.norm()
    assert 1e-4 < difference <= 0.03


def test_without_the_residual_more_is_lost():
    layout = LAYOUTS["even"]
    q, k = inputs(layout)
    # Keys alike in a block, as smooth latents have them.
    k = k.view(2, 4, 32, 3, 16)[:, :, :1].expand(2, 4, 32, 3, 16).reshape(k.shape) + 0.2 * k
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(8))
    recipe = RECIPE.with_fields({"order": "raster"})
    full, _ = _attend(recipe.with_fields({"select.density": 1.0, "precision": "model"}), layout, q, k, v, None)
    with_it, plan = _attend(recipe, layout, q, k, v, None)
    without, _ = _attend(recipe.with_fields({"compensate": "none"}), layout, q, k, v, None)
    assert float(plan.mask.density()) < 0.7
    assert (with_it - full).norm() < 0.5 * (without - full).norm()


OTHERS = {
    "calibrated densities, rectified selection": {"select": "reallocated", "compensate": "residual"},
    "sampled selection in INT8": {"select": "sampled", "precision": "int8"},
    "global gate on a curve": {"order": "curve", "select": "global_gate", "precision": "int8_fp8"},
    "sorted segments with a residual": {"order": "sorted", "select": "pooled", "compensate": "residual"},
    "gated on axes with a pooled mass": {
        "order": "axes",
        "select": "gated_pooled",
        "select.top_p": 0.4,
        "select.similarity": 0.0,
        "compensate": "pooled_mass",
        "compensate.gain_aware": False,
    },
    "mass in tiles with a pyramid of all levels": {
        "select": "mass",
        "compensate": "key_pyramid",
        "compensate.cumulative": (0.3, 0.5, 0.7, 0.9),
        "compensate.similarity": (),
    },
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("name", ["text first", "image"])
def test_other_compositions_compute_what_their_plans_say(name, changes):
    layout = LAYOUTS[name]
    phase = {"schedule.few_steps": 0}  # of five steps one is dense
    recipe = presets.pooled(dense_fraction=0.2).with_fields({**changes, **phase, "select.block": BLOCK})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    q, k = inputs(layout)
    engine = Engine(recipe, ["first", "second"], "auto", 0)
    calls = []
    engine.observer = calls.append
    for index in range(5):
        step = StepContext(index=index, num_steps=5, sigma=1 - index / 5, forward_id=index)
        for layer in range(2):
            out = attend(engine, layer, AttentionInputs(q, k, k, half_hidden(layout)), layout, step, lambda: k)
            plan = calls.pop().plan
            assert (plan is None) == (index == 0)
            if plan is not None:
                assert_attends(recipe, plan, out, q, k, k, half_hidden(layout))
    assert engine.records[0].sparse_calls == 4
