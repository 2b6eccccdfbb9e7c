"""Sparse calls of the engine against dense attention with the equivalent token mask, in float64."""

import pytest
import torch

from dit_accel import Recipe
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.calls import attend
from tests.stages.oracle import masked_attention, pooled_tokens, window_tokens

LAYOUTS = {
    "alone": TokenLayout((3, 7, 9), 0, 189),
    "text first": TokenLayout((3, 7, 9), 13, 202),
    "text last": TokenLayout((3, 7, 9), 0, 204),
    "image": TokenLayout((1, 13, 15), 0, 195),
}
# Rounding unit of the inputs' dtype, times a budget for one softmax-weighted mean of normal values.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _inputs(layout: TokenLayout, dtype: torch.dtype, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    # Keys drawn to a few directions, so that scores differ by more than the rounding of the dtype.
    return [
        (torch.randn(batch, layout.seq_len, 2, 16, generator=generator) * factor).to(dtype)
        for factor in (1.5, 1.5, 1.0)
    ]


def _attend(recipe: Recipe, layout: TokenLayout, q, k, v, attn_mask=None, engine=None, **step) -> torch.Tensor:
    engine = engine or Engine(recipe, ["layer"], "auto", 0)

    def dense() -> torch.Tensor:
        raise AssertionError("the call fell back to dense attention")

    return attend(engine, 0, AttentionInputs(q, k, v, attn_mask), layout, StepContext(**step), dense)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_window(name, order, dtype):
    layout = LAYOUTS[name]
    window = (min(2, layout.grid[0]), 3, 5)
    q, k, v = _inputs(layout, dtype)
    out = _attend(Recipe(order=order, select=Window(window=window, block=(64, 32))), layout, q, k, v)
    expected = masked_attention(q, k, v, window_tokens(layout, window))
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("density", "top_p"), [(0.3, None), (None, 0.5), (0.2, 0.4)], ids=str)
def test_pooled(density, top_p, name, order, dtype):
    layout = LAYOUTS[name]
    q, k, v = _inputs(layout, dtype)
    select = Pooled(density=density, top_p=top_p, block=(64, 32))
    out = _attend(Recipe(order=order, select=select), layout, q, k, v)
    rows = order.rows(layout, q.device)
    rows = list(range(layout.seq_len)) if rows is None else rows.tolist()
    expected = masked_attention(q, k, v, pooled_tokens(layout, rows, q, k, (64, 32), density, top_p))
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kind", ["window", "pooled"])
@pytest.mark.parametrize("shape", ["[B, 1, 1, S]", "[B, S]"])
def test_padded_prompts(kind, shape):
    layout = LAYOUTS["text last"]
    q, k, v = _inputs(layout, torch.float32)
    key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
    key_mask[0, 193:] = False
    key_mask[1, 201:] = False
    attn_mask = key_mask[:, None, None] if "1" in shape else key_mask
    order = Tiles((2, 4, 4))
    if kind == "window":
        select = Window(window=(2, 3, 5), block=(64, 32))
        mask = window_tokens(layout, (2, 3, 5)) & key_mask[:, None, None, :]
    else:
        select = Pooled(density=0.3, sink_first_frame=True, block=(64, 32))
        rows = order.rows(layout, q.device).tolist()
        mask = pooled_tokens(layout, rows, q, k, (64, 32), 0.3, None, key_mask, sink_first_frame=True)
    out = _attend(Recipe(order=order, select=select), layout, q, k, v, attn_mask)
    expected = masked_attention(q, k, v, mask)
    assert (out.double() - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("select", [Pooled(density=1.0), Window(window=(1.0, 1.0, 1.0))], ids=["pooled", "window"])
def test_density_one_equals_dense(select):
    layout = LAYOUTS["text first"]
    q, k, v = _inputs(layout, torch.float32)
    engine = Engine(Recipe(order=Tiles(), select=select), ["layer"], "auto", 0)
    out = _attend(engine.recipe, layout, q, k, v, engine=engine)
    expected = masked_attention(q, k, v, torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool))
    assert (out.double() - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()
    assert float(engine.records[0].density_sum) == 1.0


def test_reported_density_is_that_of_the_mask():
    layout = TokenLayout((8, 16, 16), 0, 2048)
    q, k, v = _inputs(layout, torch.float32, batch=1)
    engine = Engine(Recipe(order=Tiles(), select=Pooled(density=0.25, block=(64, 64))), ["layer"], "auto", 0)
    _attend(engine.recipe, layout, q, k, v, engine=engine)
    # 8 of 32 blocks, and the own block where the top ones miss it
    assert 8 / 32 <= float(engine.records[0].density_sum) <= 9 / 32


def test_plans_are_kept_per_branch_and_made_again_in_time():
    layout = LAYOUTS["alone"]
    q, k, v = _inputs(layout, torch.float32, batch=1)
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32))).with_fields({"schedule.refresh_every": 3})
    engine = Engine(recipe, ["layer"], "auto", 0)
    for index in range(6):
        for forward, branch in enumerate(("cond", "uncond")):
            _attend(
                recipe,
                layout,
                q,
                k,
                v,
                engine=engine,
                index=index,
                num_steps=6,
                branch=branch,
                forward_id=2 * index + forward,
            )
    assert engine.records[0].plans_made == 4
    assert engine.records[0].sparse_calls == 12


@pytest.mark.parametrize("select", [Pooled(density=0.5), Window()], ids=["pooled", "window"])
def test_nan_is_passed_on_and_counted(select):
    layout = LAYOUTS["alone"]
    q, k, v = _inputs(layout, torch.float32)
    engine = Engine(Recipe(order=Tiles(), select=select), ["layer"], "auto", 0)
    _attend(engine.recipe, layout, q, k, v, engine=engine)
    assert int(engine.records[0].nan_calls) == 0
    q[0, 5, 1, 3] = float("nan")
    out = _attend(engine.recipe, layout, q, k, v, engine=engine)
    assert out[0, 5, 1].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert int(engine.records[0].nan_calls) == 1


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(2, 1, 1, 189), "additive attention mask"),
        (torch.ones(2, 3, 189, 189, dtype=torch.bool), "an attention mask of shape (2, 3, 189, 189)"),
    ],
)
def test_masks_that_are_no_key_masks_stay_dense_with_a_reason(mask, reason):
    layout = LAYOUTS["alone"]
    q, k, v = _inputs(layout, torch.float32)
    engine = Engine(Recipe(select=Pooled()), ["layer"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v, mask), layout, StepContext(), lambda: v)
    assert out is v
    (recorded,) = engine.records[0].dense_calls
    assert reason in recorded


@pytest.mark.parametrize("heads", [1, 2])
def test_a_key_mask_that_was_expanded_is_one_still(heads):
    q, k, v = _inputs(LAYOUTS["alone"], torch.float32)
    keys = torch.arange(189) < torch.tensor([[180], [189]])
    expanded = keys[:, None, None].expand(-1, heads, 189, -1)
    call = AttentionCall.of(0, AttentionInputs(q, k, v, expanded), LAYOUTS["alone"], StepContext(), Run())
    assert call.pairs is None
    assert call.unread is None
    assert torch.equal(call.key_mask, keys)
    same = AttentionInputs(q, k, v, expanded.contiguous())
    assert AttentionCall.of(0, same, LAYOUTS["alone"], StepContext(), Run()).pairs is not None


def test_gradients_flow_through_a_sparse_call():
    layout = LAYOUTS["text last"]
    q, k, v = (tensor.requires_grad_() for tensor in _inputs(layout, torch.float32))
    recipe = Recipe(order=Tiles((2, 4, 4)), select=Window(window=(2, 3, 5), block=(64, 32)))
    out = _attend(recipe, layout, q, k, v)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    twins = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected = masked_attention(*twins, window_tokens(layout, (2, 3, 5)))
    for grad, wanted in zip(grads, torch.autograd.grad((expected * weight).sum(), twins), strict=True):
        assert (grad.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
