"""Quantised calls of the engine against SageAttention's equations, in float64 with loops over heads."""

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.stages.compensate.pyramid import KeyPyramid
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.precision import Int8, Int8Fp8
from dit_accel.stages.select.pooled import Pooled
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs
from tests.stages.oracle import masked_attention

BLOCK = (64, 32)


def _inputs(layout):
    q, k = inputs(layout)
    # Keys with a common offset: without smoothing it would take the 8 bits' range.
    return q, k + 6.0, torch.randn(q.shape, generator=torch.Generator().manual_seed(4))


def _run(recipe, layout, q, k, v, key_mask=None, engine=None):
    engine = engine or Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), lambda: pytest.fail("ran dense"))
    return out, calls[0].plan, engine


def _steps(x, size):
    """x rounded to 127 steps of its largest value, per row of the last dimensions or block of rows."""
    step = x.abs().amax(-1 if size == 1 else (-1, -2), keepdim=True) / 127
    return _straight(x, (x / step).round() * step)


def _straight(x, rounded):
    """The rounded value, with the gradient of x."""
    return x + (rounded - x).detach()


def _hadamard(size):
    """Sylvester's matrix, orthonormal: by doubling."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix * size**-0.5


def _expected(precision, layout, plan, q, k, v, key_mask):
    """Attention of the rounded numbers over the plan's tokens, (B, S, H, D) float64."""
    batch, length, heads, dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    kept = plan.mask.to_tokens().expand(batch, heads, -1, -1)
    rows = torch.arange(length) if plan.rows is None else plan.rows[0, 0].long()
    for b in range(batch):
        for h in range(heads):
            queries, keys, values = (x[b, rows, h].double() for x in (q, k, v))
            # A mean over the sequence is the same for all keys of a row, and drops out of its softmax.
            keys = keys - keys.mean(0)
            if precision.rotate:
                queries, keys = queries @ _hadamard(dim), keys @ _hadamard(dim)
            logits = torch.zeros(length, length, dtype=torch.float64)
            if precision.key_scales == "thread":
                rounded = torch.empty_like(keys)
                for lane in range(4):
                    for first in range(0, length, BLOCK[1]):
                        held = [n for n in range(first, min(first + BLOCK[1], length)) if n % 8 // 2 == lane]
                        rounded[held] = _steps(keys[held], 2) if held else 0.0
            else:
                rounded = torch.cat([_steps(part, 2) for part in keys.split(BLOCK[1])])
            for first in range(0, length, BLOCK[0]):
                part = queries[first : first + BLOCK[0]]
                mean = part.mean(0) if precision.smooth_q else torch.zeros(dim, dtype=torch.float64)
                own = _steps(part - mean, 1) + mean
                logits[first : first + BLOCK[0]] = own @ rounded.T * dim**-0.5
            seen = kept[b, h].clone()
            if key_mask is not None:
                seen &= key_mask[b, rows]
            if isinstance(precision, Int8Fp8):
                top = values.abs().amax(0) / 448
                values = _straight(values, (values / top).float().to(torch.float8_e4m3fn).double() * top)
            out[b, rows, h] = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out


@pytest.mark.parametrize(
    "precision", [Int8(), Int8(smooth_q=True), Int8(rotate=True), Int8Fp8(), Int8Fp8(key_scales="thread")], ids=repr
)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("hidden", [False, True])
def test_sparse_calls_are_those_of_the_rounded_numbers(name, order, precision, hidden):
    layout = LAYOUTS[name]
    q, k, v = _inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    recipe = Recipe(order=order, select=Pooled(density=0.4, block=BLOCK), precision=precision)
    out, plan, engine = _run(recipe, layout, q, k, v, key_mask)
    expected = _expected(precision, layout, plan, q, k, v, key_mask)
    # A tie in rounding may fall to the other side: a step of one of 16 products, on logits of some tens.
    assert (out.double() - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (out.double() - expected).abs().mean() <= 2e-5 * expected.abs().max()
    assert "emulated" in engine.backends_used.to_dict()["quantized_attention"]["torch"]
    exact, _, _ = _run(recipe.with_fields({"precision": "model"}), layout, q, k, v, key_mask)
    assert (out - exact).abs().mean() > 1e-3 * exact.abs().mean(), "nothing was quantised"


@pytest.mark.parametrize(
    "precision", [Int8(), Int8(smooth_q=True), Int8(rotate=True), Int8Fp8(key_scales="thread")], ids=repr
)
@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("hidden", [False, True])
def test_gradients_go_straight_through_the_rounding(order, precision, hidden):
    """They are those of the rounded numbers, and no others: at what was not rounded they differ."""
    layout = LAYOUTS["ragged"] if "ragged" in LAYOUTS else list(LAYOUTS.values())[-1]
    inputs = [x.requires_grad_() for x in _inputs(layout)]
    key_mask = half_hidden(layout) if hidden else None
    recipe = Recipe(order=order, select=Pooled(density=0.4, block=BLOCK), precision=precision)
    out, plan, _ = _run(recipe, layout, *inputs, key_mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(out, inputs, weight)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(_expected(precision, layout, plan, *twins, key_mask), twins, weight.double())
    exact, _, _ = _run(recipe.with_fields({"precision": "model"}), layout, *inputs, key_mask)
    others = torch.autograd.grad(exact, inputs, weight)
    for got, want, other in zip(found, wanted, others, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()
        assert (other - want).norm() > 4e-3 * want.norm()


def test_integer_weights_are_emulated_and_lose_more():
    layout = next(iter(LAYOUTS.values()))
    q, k, v = _inputs(layout)
    recipe = Recipe(select=Pooled(density=0.4, block=BLOCK))
    exact, _, _ = _run(recipe, layout, q, k, v)
    errors = []
    for precision in ("int8", "int8_int8", "int8_int4"):
        out, _, engine = _run(recipe.with_fields({"precision": precision}), layout, q, k, v)
        assert "emulated" in engine.backends_used.to_dict()["quantized_attention"]["torch"]
        errors.append((out - exact).norm() / exact.norm())
    assert errors[0] < errors[1] < errors[2] < 0.3


@pytest.mark.parametrize("values", ["model", "fp8"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sage_reads_everything_and_stays_close(name, values):
    layout = LAYOUTS[name]
    q, k, v = _inputs(layout)
    out, plan, engine = _run(presets.sage(values=values), layout, q, k, v)
    assert plan.mask.to_tokens().all()
    assert float(engine.records[0].density_sum) == 1.0
    exact = masked_attention(q, k, v, torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool))
    # Half a step of 1/127 in q and in k, over logits of up to some tens, and of 1/16 in FP8 values.
    bound = 0.03 if values == "model" else 0.05
    assert (out.double() - exact).norm() <= bound * exact.norm()


def test_sage_without_smoothing_is_worse():
    layout = LAYOUTS["even"]
    q, k, v = _inputs(layout)
    k = k + 40.0  # steps of the keys grow about sevenfold
    exact = masked_attention(q, k, v, torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool))
    smooth, _, _ = _run(presets.sage(), layout, q, k, v)
    rough, _, _ = _run(presets.sage().with_fields({"precision.smooth_k": False}), layout, q, k, v)
    assert (rough.double() - exact).norm() > 2 * (smooth.double() - exact).norm()


def test_what_cannot_be_quantised_says_so():
    layout = LAYOUTS["even"]
    q, k, v = _inputs(layout)
    engine = Engine(presets.sage(), ["layer"], "triton", 0)
    from dit_accel.kernels.common.capability import interpreted

    if not interpreted():
        with pytest.raises(ValueError, match=r"'triton' cannot run .* here: .*CUDA"):
            _run(presets.sage(), layout, q.detach(), k, v, engine=engine)
    with pytest.raises(ValueError, match="KeyPyramid has kernels of its own"):
        Recipe(select=Pooled(), compensate=KeyPyramid(), precision=Int8())
    with pytest.raises(ValueError, match="select 'full'"):
        Recipe(precision=Int8Fp8())
    with pytest.raises(ValueError, match=r"key_scales must be one of block, thread, got 'warp'\."):
        Int8(key_scales="warp")
    with pytest.raises(ValueError, match=r"precision\.rotate and precision\.smooth_q"):
        Int8(rotate=True, smooth_q=True)
    narrow = [x.detach()[..., :12] for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"rotate needs a head dim of 16, 32, 64, 128, got 12\."):
        _run(presets.sage(rotate=True), layout, *narrow)
    with pytest.raises(ValueError, match="values must be"):
        presets.sage(values="int4")


def test_precision_is_chosen_by_name_and_survives_json():
    recipe = presets.pooled().with_fields(
        {"precision": "int8", "precision.smooth_q": "True", "precision.key_scales": "thread"}
    )
    assert recipe.precision == Int8(smooth_q=True, key_scales="thread")
    assert Recipe.from_dict(recipe.to_dict()) == recipe != presets.pooled()
    turned = presets.sage(rotate=True)
    assert turned.precision == Int8(rotate=True)
    assert Recipe.from_dict(turned.to_dict()) == turned != presets.sage()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rotated_recipe_is_as_near_to_dense_attention(name):
    """Of inputs with channels that stand out and have no mean, nearer than without."""
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, layout.seq_len, 2, 64) for _ in range(3))
    q[..., 7], k[..., 30] = 25 * q[..., 7], 25 * k[..., 30]
    q, k = q / 6, k / 6
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    errors = {}
    for rotate in (False, True):
        out, _, _ = _run(presets.sage(rotate=rotate), layout, q, k, v)
        errors[rotate] = float((out.double() - exact.transpose(1, 2)).norm() / exact.norm())
    assert errors[True] <= 2e-2
    assert errors[False] > 1.5 * errors[True]


def test_another_projects_backend_is_refused_in_8_bits():
    layout = next(iter(LAYOUTS.values()))
    engine = Engine(presets.sage(), ["layer"], "fa4", 0)
    with pytest.raises(ValueError, match=r"'fa4' cannot run quantized attention here: .*no 8-bit kernels"):
        _run(presets.sage(), layout, *_inputs(layout), engine=engine)
