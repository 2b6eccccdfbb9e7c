"""Quantised attention: the prologue against plain torch, the kernels against dequantised attention."""

from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels import quantize_inputs, quantized_block_sparse_attention
from dit_accel.kernels.attention.launch_configs import LaunchConfig
from dit_accel.kernels.common.quantized_inputs import KEY_PLACE, dequantize, reference_quantize, rotation
from dit_accel.kernels.quantized.triton import forward as portable
from dit_accel.kernels.quantized.triton.prologue import quantize_inputs as prologue

from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention, on_cpu
from .test_block_sparse import build

GPU = torch.cuda.is_available()
# Triton's interpreter drops the carry when an e4m3 mantissa rounds up to the next power of two: about 2% of
# random values come out halved there, in the stored values and in the weights.
LOST_CARRY = 0.0 if GPU else 0.1
CASES = {
    "ragged": {"length": 203},
    "blocks_128x64": {"block": (128, 64), "length": 300},
    "rows_key_mask": {"batch": 2, "lead": (2, 3), "key_mask": True, "rows": (2, 3), "length": 203},
    "bits": {"bits": True, "length": 203},
    "empty_rows": {"empty_rows": True, "length": 203},
    "more_keys": {"length": 100, "kv_length": 230},
}
GPU_CASES = {
    "ragged": {"length": 1000},
    "rows_key_mask": {"batch": 2, "lead": (2, 3), "key_mask": True, "rows": (2, 3), "length": 1000},
    "bits": {"bits": True, "length": 1000},
    "empty_rows": {"empty_rows": True, "length": 1000},
    "many_tiles": {"length": 6000, "heads": 4},
}


def moved(device, *values):
    return [None if x is None else x.to(device) for x in values]


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth_q": True},
        {"smooth_k": False},
        {"permuted": True},
        {"key_scales": "thread"},
        {"key_scales": "thread", "permuted": True, "smooth_q": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128)], ids=str)
def test_prologue_matches_torch(block, options, precision, device):
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    torch.manual_seed(3)
    options = dict(options)
    rows = torch.rand(2, 3, 203).argsort(-1) if options.pop("permuted", False) else None
    q, k, v = (torch.randn(2, 203, 3, 40).half() + 1.5 for _ in range(3))
    expected = reference_quantize(q, k, v, *block, precision=precision, rows=rows, **options)
    q, k, v, rows = moved(device, q, k, v, rows)
    actual = quantize_inputs(q, k, v, *block, precision=precision, rows=rows, **options)
    for name in ("q_scale", "k_scale", "q_mean", "k_mean", "q_shift"):
        torch.testing.assert_close(  # shapes too
            getattr(actual, name).cpu(),
            getattr(expected, name),
            rtol=2e-5,
            atol=2e-4 if name == "q_shift" else 2e-6,
        )
    for name in ("q", "k"):
        difference = (getattr(actual, name).cpu().int() - getattr(expected, name).int()).abs()
        # Halves may round either way after a different order of the float32 sums; nothing moves by two.
        assert difference.max() <= 1
        assert difference.float().mean() < 2e-3
    if precision == "int8":
        assert torch.equal(actual.v.cpu(), expected.v)
    else:
        assert torch.equal(actual.v_scale.cpu(), expected.v_scale)
        same = actual.v.cpu().view(torch.uint8) == expected.v.view(torch.uint8)
        assert same.float().mean() > (0.999 if GPU else 0.96)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("key_scales", ["block", "thread"])
def test_prologue_is_the_same_however_many_programs_share_it(key_scales, permuted, device, monkeypatch):
    from dit_accel.kernels.quantized.triton import prologue as triton_quantize

    torch.manual_seed(5)
    kv_length = 300 if permuted else 520
    q, k, v = (torch.randn(2, n, 3, 40).half().to(device) for n in (300, kv_length, kv_length))
    rows = torch.rand(2, 3, 300).argsort(-1).to(device) if permuted else None
    results = []
    # One program for every block of q and k, with more programs than blocks of v; then several blocks each.
    for slots, shares in ((1000, 5 if permuted else 9), (40, 2), (1, 1)):
        monkeypatch.setattr(triton_quantize, "_slots", lambda device, slots=slots: slots)
        assert triton_quantize._shares(5 if permuted else 9, 18, slots) == shares
        made = prologue(q, k, v, 64, 64, precision="int8_fp8", rows=rows, key_scales=key_scales)
        values = [getattr(made, field.name) for field in fields(made)]
        results.append([value for value in values if isinstance(value, torch.Tensor)])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), same.contiguous().view(torch.uint8))


@pytest.mark.parametrize("lengths", [(500, 70), (70, 500)], ids=str)
def test_programs_without_a_block_touch_nothing(lengths, device, monkeypatch):
    from dit_accel.kernels.quantized.triton import prologue as triton_quantize

    monkeypatch.setattr(triton_quantize, "_slots", lambda device: 1000)
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, n, 2, 32).half() for n in (lengths[0], lengths[1], lengths[1]))
    expected = reference_quantize(q, k, v, 32, 64, precision="int8_fp8")
    actual = prologue(*moved(device, q, k, v), 32, 64, precision="int8_fp8")
    for name in ("q_scale", "k_scale", "q_mean", "k_mean"):
        torch.testing.assert_close(getattr(actual, name).cpu(), getattr(expected, name), rtol=2e-5, atol=2e-6)
    assert torch.equal(actual.v_scale.cpu(), expected.v_scale)
    assert (actual.v.cpu().view(torch.uint8) == expected.v.view(torch.uint8)).float().mean() >= 1 - LOST_CARRY


def test_key_place_is_a_permutation():
    assert sorted(KEY_PLACE) == list(range(16))


@pytest.mark.parametrize(
    ("tiles", "length", "sampled"), [(2, 700, [0, 3]), (3, 830, [0, 2, 4, 6]), (64, 300, [0, 1, 2])], ids=str
)
def test_the_mean_key_is_that_of_sampled_tiles(tiles, length, sampled, device, monkeypatch):
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs as fused_quantize

    monkeypatch.setattr("dit_accel.kernels.common.quantized_inputs.KEY_TILES", tiles)
    q, k, v, mask, rows, _, visible = build(length=length, dim=16, block=(64, 64), dtype=torch.float16, rows=(1, 3))
    k = (k + 3 * torch.randn(1, 1, 3, 16)).half()
    seen = torch.cat([torch.arange(tile * 128, min(tile * 128 + 128, length)) for tile in sampled])
    center = k[:, seen].double().mean(1)
    order = rows[0].long()[:, :, None].expand(-1, -1, 16)
    permuted = q[0].transpose(0, 1).double().gather(1, order)
    shift = (permuted * center[0][:, None]).sum(-1)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    q, k, v, mask, rows = moved(device, q, k, v, mask, rows)
    for ready in (reference_quantize(q, k, v, 64, 64, rows=rows), fused_quantize(q, k, v, 64, 64, rows=rows)):
        torch.testing.assert_close(ready.q_shift[0, :, :length].cpu().double(), shift, rtol=1e-5, atol=1e-4)
    out, lse = quantized_block_sparse_attention(q, k, v, mask, rows=rows, return_lse=True, backend="triton")
    assert (out.cpu().double() - exact).norm() <= 2e-2 * exact.norm()
    assert (lse.cpu() - exact_lse).abs().max() <= 0.05


@pytest.mark.parametrize("key_scales", ["block", "thread"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_key_outside_the_sample_is_seen(bad, key_scales, device, monkeypatch):
    monkeypatch.setattr("dit_accel.kernels.common.quantized_inputs.KEY_TILES", 1)
    q, k, v, mask, _, _, visible = build(length=400, dim=32, block=(64, 64), dtype=torch.float16)
    k[0, 170, 1, 7] = bad
    q, k, v, mask = moved(device, q, k, v, mask)
    for backend in ("triton", "reference"):
        out, lse = quantized_block_sparse_attention(
            q, k, v, mask, key_scales=key_scales, return_lse=True, backend=backend
        )
        block = visible[0, 1, :, 128:192].any(-1)  # the scale is that of the block
        assert block.any()
        assert not block.all()
        shown = lse[0].isnan().cpu()
        assert torch.equal(shown.any(1), torch.tensor([False, True, False]))
        assert torch.equal(shown[1], block)
        assert torch.equal(out[0].isnan().any(-1).cpu(), shown.T)


def test_scales_by_thread_are_of_the_keys_that_a_thread_holds():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 100, 2, 16, dtype=torch.float64).float() for _ in range(3))
    quantized = reference_quantize(q, k, v, 32, 32, key_scales="thread")
    assert quantized.k_scale.shape == (1, 2, 4, 4)
    centred = k.double() - k.double().mean(1, keepdim=True)
    _, back, _ = dequantize(quantized, 32)
    for head in range(2):
        for block in range(4):
            for thread in range(4):
                # Columns 8 n + 2 t and 8 n + 2 t + 1 of the accumulator.
                held = [block * 32 + 8 * n + 2 * thread + pair for n in range(4) for pair in range(2)]
                held = [key for key in held if key < 100]
                if not held:  # past the end
                    continue
                step = centred[0, held, head].abs().max() / 127
                assert abs(quantized.k_scale[0, head, block, thread] / step - 1) < 1e-5
                rounded = (centred[0, held, head] / step).round() * step
                difference = (back[0, head, held].double() - rounded).abs() / step
                assert (difference > 1e-3).float().mean() < 1e-2, "more than ties"


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("rows", [None, (1, 3)], ids=["in_order", "permuted"])
def test_scales_by_thread_keep_outlier_keys_to_themselves(rows, dim, precision, device):
    q, k, v, mask, order, _, visible = build(length=300, dim=dim, block=(64, 64), dtype=torch.float16, rows=rows)
    # One key of 64 is some 15 times as large, in a channel that queries hardly look at: with one scale a block it
    # makes the steps of all keys coarse, with scales by thread those of a quarter of them.
    q[..., 5] *= 0.02
    for head in range(3):
        at = torch.arange(3, 300, 64) if order is None else order[0, head, 3::64].long()
        k[0, at, head, 5] = 50.0
    exact, exact_lse = dense_attention(q, k, v, visible, order)
    q, k, v, mask, order = moved(device, q, k, v, mask, order)
    errors, lse_errors = {}, {}
    for key_scales in ("block", "thread"):
        out, lse = quantized_block_sparse_attention(
            q, k, v, mask, precision=precision, rows=order, key_scales=key_scales, return_lse=True, backend="triton"
        )
        fake, fake_lse = quantized_block_sparse_attention(
            q, k, v, mask, precision=precision, rows=order, key_scales=key_scales, return_lse=True, backend="reference"
        )
        rounding = (2.0**-4 + LOST_CARRY if precision == "int8_fp8" else UNIT_ROUNDOFF[torch.float16]) / 2
        eager = fake.double() + rounding * v.double().abs().amax()
        assert_close(out, fake.double(), eager, torch.float16, f"{key_scales} against the dequantised inputs")
        assert (lse - fake_lse).abs().max() <= 2e-3
        errors[key_scales] = ((fake.cpu().double() - exact).norm() / exact.norm()).item()
        lse_errors[key_scales] = (lse.cpu() - exact_lse).square().mean().sqrt().item()
    # A quarter of the keys keep the coarse steps, so errors that add up at random are about half.
    assert lse_errors["thread"] < 0.75 * lse_errors["block"], lse_errors
    if precision == "int8":
        assert errors["thread"] < 0.75 * errors["block"], errors


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_dequantised_inputs_are_close(precision):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    quantized = reference_quantize(q, k, v, 64, 64, precision=precision, smooth_k=False)
    back = dequantize(quantized, 64)
    for x, y, step in zip((q, k, v), back, (1 / 254, 1 / 254, 2**-4)):
        limit = x.abs().max() * step * 1.01 if precision == "int8_fp8" or x is not v else 0
        assert (x.transpose(1, 2) - y[:, :, :100]).abs().max() <= limit


def check(device, precision, dtype, backend, key_scales="block", **case):
    q, k, v, mask, rows, hide, visible = build(**{"dim": 64, **case}, dtype=dtype)
    # An offset common to all keys must change nothing but the log-sum-exp, which must follow it.
    k = k + 3 * torch.randn(1, 1, k.shape[2], k.shape[3]).to(dtype)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    on = moved(device, q, k, v, mask, rows, hide)
    # Both from the numbers of the prologue on this device, whose sums of k in another order may round one up for down.
    ready = prologue(*on[:3], mask.block_q, mask.block_k, precision=precision, rows=on[4], key_scales=key_scales)
    fake = quantized_block_sparse_attention(
        q,
        k,
        v,
        mask,
        precision=precision,
        rows=rows,
        key_mask=hide,
        return_lse=True,
        backend="reference",
        quantized=on_cpu(ready),
    )
    out, lse = quantized_block_sparse_attention(
        *on[:4],
        precision=precision,
        rows=on[4],
        key_mask=on[5],
        return_lse=True,
        backend=backend,
        quantized=ready,
    )
    out, lse = out.cpu(), lse.cpu()
    # Against the same quantised numbers: one rounding of the weights (e4m3 keeps 4 bits) and of the output.
    lost = LOST_CARRY if precision == "int8_fp8" else 0.0
    weight_rounding = (2.0**-4 if precision == "int8_fp8" else UNIT_ROUNDOFF[dtype]) + lost
    eager = fake[0].double() + weight_rounding * v.double().abs().amax() / 2
    assert_close(out, fake[0].double(), eager, dtype, "out against the dequantised inputs")
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= (4e-2 if precision == "int8_fp8" else 2e-2) + lost, f"relative error {error:.3e}"
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse - exact_lse)[seen].abs().max() <= 0.05
    assert (lse - fake[1])[seen].abs().max() <= 2e-3
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.parametrize("key_scales", ["block", "thread"])
@pytest.mark.parametrize("case", CASES)
def test_int8_matches_dequantised_attention(case, key_scales, device):
    check(device, "int8", torch.float16, "triton", key_scales, **CASES[case])


@pytest.mark.parametrize("key_scales", ["block", "thread"])
@pytest.mark.parametrize("case", ["ragged", "rows_key_mask"])
def test_fp8_matches_dequantised_attention(case, key_scales, device):
    check(device, "int8_fp8", torch.float16, "triton", key_scales, **CASES[case])


@pytest.mark.parametrize(
    ("precision", "key_scales", "case"),
    [("int8", "thread", "ragged"), ("int8", "block", "bits"), ("int8_fp8", "thread", "rows_key_mask")],
)
def test_tiles_of_a_block_match_too(precision, key_scales, case, device, monkeypatch):
    """As GPUs have them on which each warp multiplies by itself."""
    monkeypatch.setattr(portable, "quantized_launch", lambda *_: LaunchConfig(4, 1, 32, 32))
    check(device, precision, torch.float16, "triton", key_scales, **CASES[case])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128, 128), (128, 64, 128), (128, 128, 64), (64, 64, 96)], ids=str)
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("key_scales", ["block", "thread"])
def test_compiled(key_scales, case, shape, dtype, precision, device):
    check(device, precision, dtype, "triton", key_scales, **GPU_CASES[case], block=shape[:2], dim=shape[2])


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("smooth_q", [False, True])
def test_channel_outliers(precision, smooth_q, device):
    """Channels 30 times as large as the rest: an offset that all tokens share, as real keys have it."""
    q, k, v, mask, _, _, visible = build(length=300, dim=64, block=(64, 64), dtype=torch.float16)
    k[..., 5] += 30
    k[..., 40] -= 30
    if smooth_q:
        q[..., 17] += 30
    exact, exact_lse = dense_attention(q, k, v, visible)
    q, k, v, mask = moved(device, q, k, v, mask)
    out, lse = quantized_block_sparse_attention(
        q, k, v, mask, precision=precision, smooth_q=smooth_q, return_lse=True, backend="triton"
    )
    error = (out.cpu().double() - exact).norm() / exact.norm()
    assert error <= (4e-2 + LOST_CARRY if precision == "int8_fp8" else 2e-2)
    assert (lse.cpu() - exact_lse).abs().max() <= 0.1
    errors = {}
    for smooth in (False, True):
        plain = quantized_block_sparse_attention(
            q,
            k,
            v,
            mask,
            precision=precision,
            smooth_k=smooth,
            smooth_q=smooth and smooth_q,
            backend="reference",
        )
        errors[smooth] = (plain.cpu().double() - exact).norm() / exact.norm()
    assert errors[False] > 2 * errors[True]


def outliers(q, k):
    """Channels of queries and keys that stand out, with a sign of their own in each token, so that no mean shows it."""
    for x, channel in ((q, 17), (q, 40), (k, 5), (k, 41)):
        x[..., channel] *= 25
    return q / 12, k / 12


@pytest.mark.parametrize("rows", [None, (1, 3)], ids=["in_order", "permuted"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [(128, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("stands_out", [False, True], ids=["normal", "outliers"])
def test_sums_in_half_precision_and_rotation_keep_the_error(stands_out, block, dim, rows, device):
    """As GeForce cards run INT8: relative error at most 2e-2, with a tile of keys summed in float16."""
    q, k, v, mask, order, _, visible = build(length=300, dim=dim, block=block, dtype=torch.float16, rows=rows)
    if stands_out:
        q, k = outliers(q, k)
    exact, exact_lse = dense_attention(q, k, v, visible, order)
    q, k, v, mask, order = moved(device, q, k, v, mask, order)
    ready = prologue(q, k, v, *block, rows=order, rotate=stands_out, key_scales="thread", half_sums=True)
    config = LaunchConfig(4, 2, *block)
    out, lse = portable.quantized_forward(ready, mask, order, None, dim**-0.5, q.shape[2], q.dtype, config=config)
    assert (out.cpu().double() - exact).norm() <= 2e-2 * exact.norm()
    assert (lse.cpu() - exact_lse).abs().max() <= 0.05


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_rotation_spreads_outliers_that_have_no_mean(precision, device):
    """Against the same call without: smoothing cannot take away what has no mean."""
    q, k, v, mask, _, _, visible = build(length=300, dim=128, block=(64, 64), dtype=torch.float16)
    q, k = outliers(q, k)
    exact, exact_lse = dense_attention(q, k, v, visible)
    q, k, v, mask = moved(device, q, k, v, mask)
    errors = {}
    for rotate in (False, True):
        plain = quantized_block_sparse_attention(
            q, k, v, mask, precision="int8", rotate=rotate, return_lse=True, backend="reference"
        )
        errors[rotate] = float((plain[0].cpu().double() - exact).norm() / exact.norm())
    out, lse = quantized_block_sparse_attention(
        q, k, v, mask, precision=precision, rotate=True, return_lse=True, backend="triton"
    )
    error = (out.cpu().double() - exact).norm() / exact.norm()
    assert error <= (4e-2 + LOST_CARRY if precision == "int8_fp8" else 2e-2)
    assert (lse.cpu() - exact_lse).abs().max() <= 0.05
    assert errors[False] > 1.5 * errors[True], errors


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_the_rotation_is_orthonormal_and_the_kernels_own(dim, device):
    turn = rotation(dim).double()
    assert torch.allclose(turn @ turn.T, torch.eye(dim).double(), atol=1e-6)
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, 203, 3, dim).half() + 1.5 for _ in range(3))
    rows = torch.rand(2, 3, 203).argsort(-1)
    expected = reference_quantize(q, k, v, 64, 64, rows=rows, rotate=True, key_scales="thread")
    actual = prologue(*moved(device, q, k, v), 64, 64, rows=rows.to(device), rotate=True, key_scales="thread")
    for name in ("q_scale", "k_scale", "q_mean", "k_mean", "q_shift"):
        mine, theirs = getattr(actual, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=3e-4 if name == "q_shift" else 1e-5)
    for name in ("q", "k"):
        difference = (getattr(actual, name).cpu().int() - getattr(expected, name).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 5e-3


def test_a_large_value_does_not_overflow_a_sum_in_half_precision(device):
    q, k, v, mask, _, _, visible = build(length=300, dim=64, block=(64, 64), dtype=torch.float16)
    q.zero_()  # all weights alike: the largest sums of a tile
    v = v.abs() * 0.01 + 60_000
    exact, _ = dense_attention(q, k, v, visible)
    q, k, v, mask = moved(device, q, k, v, mask)
    ready = prologue(q, k, v, 64, 64, half_sums=True)
    out, _ = portable.quantized_forward(ready, mask, None, None, 0.125, q.shape[2], q.dtype)
    assert out.isfinite().all()
    assert (out.cpu().double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("permuted", [False, True])
def test_values_of_another_dtype_are_rewritten_for_sums_in_half_precision(permuted, device):
    torch.manual_seed(7)
    q, k, v = (torch.randn(2, 203, 3, 64, device=device) for _ in range(3))
    rows = torch.rand(2, 3, 203).argsort(-1).to(device) if permuted else None
    made = prologue(q, k, v, 64, 64, rows=rows, half_sums=True)
    expected = reference_quantize(q.cpu(), k.cpu(), v.cpu(), 64, 64, rows=None if rows is None else rows.cpu()).v
    assert made.half_sums
    assert made.v.dtype == torch.float16
    assert torch.equal(made.v.cpu(), expected.half())
    half = prologue(q.half(), k.half(), v.half(), 64, 64, half_sums=True)
    assert half.half_sums
    assert half.v.dtype == torch.float16


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), True)],
    ids=str,
)
def test_cards_that_sum_twice_as_fast_in_half_are_known(capability, expected, monkeypatch):
    from dit_accel.kernels.common import capability as module

    monkeypatch.setattr(module, "compute_capability", lambda _index: capability)
    assert module.sums_twice_as_fast_in_half(0) is expected


def test_what_cannot_be_rotated_is_refused():
    q = torch.randn(1, 64, 2, 40)
    with pytest.raises(ValueError, match="rotate needs a head dim of 16, 32, 64, 128, got 40"):
        quantize_inputs(q, q, q, 32, 32, rotate=True)
    q = torch.randn(1, 64, 2, 32)
    with pytest.raises(ValueError, match="rotate and smooth_q"):
        quantize_inputs(q, q, q, 32, 32, rotate=True, smooth_q=True)


def test_prepared_inputs_are_reused_and_the_default_runs_anywhere():
    q, k, v, mask, rows, hide, visible = build(length=203, dim=64, rows=(1, 3), key_mask=True)
    ready = quantize_inputs(q, k, v, 64, 64, rows=rows)
    out, lse = quantized_block_sparse_attention(
        q, k, v, mask, rows=rows, key_mask=hide, quantized=ready, return_lse=True
    )
    again, again_lse = quantized_block_sparse_attention(
        q, k, v, mask, rows=rows, key_mask=hide, backend="reference", return_lse=True
    )
    torch.testing.assert_close(out, again, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, again_lse, rtol=0, atol=1e-4)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    assert (out.double() - exact).norm() / exact.norm() < 2e-2
    assert (lse - exact_lse).abs().max() < 0.05


def test_bad_arguments_are_named():
    q, k, v, mask, *_ = build()
    with pytest.raises(ValueError, match="precision must be"):
        quantized_block_sparse_attention(q, k, v, mask, precision="int2")
    with pytest.raises(ValueError, match="positive"):
        quantized_block_sparse_attention(q, k, v, mask, scale=-1.0)
    with pytest.raises(ValueError, match="backend must be"):
        quantized_block_sparse_attention(q, k, v, mask, backend="cuda")
