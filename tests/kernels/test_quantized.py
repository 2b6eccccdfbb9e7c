"""Quantised attention: the prologue against plain torch, the kernels against dequantised attention."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels import quantize_inputs, quantized_block_sparse_attention
from dit_accel.kernels.quantize import KEY_PLACE, dequantize, reference_quantize

from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention
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
@pytest.mark.parametrize("options", [{}, {"smooth_q": True}, {"smooth_k": False}, {"permuted": True}], ids=str)
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128)], ids=str)
def test_prologue_matches_torch(block, options, precision, device):
    from dit_accel.kernels.triton_quantize import quantize_inputs

    torch.manual_seed(3)
    options = dict(options)
    rows = torch.rand(2, 3, 203).argsort(-1) if options.pop("permuted", False) else None
    q, k, v = (torch.randn(2, 203, 3, 40).half() + 1.5 for _ in range(3))
    expected = reference_quantize(q, k, v, *block, precision=precision, rows=rows, **options)
    q, k, v, rows = moved(device, q, k, v, rows)
    actual = quantize_inputs(q, k, v, *block, precision=precision, rows=rows, **options)
    for name in ("q_scale", "k_scale", "q_mean", "k_mean", "q_shift"):
        torch.testing.assert_close(
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


def test_key_place_is_a_permutation():
    assert sorted(KEY_PLACE) == list(range(16))


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_dequantised_inputs_are_close(precision):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    quantized = reference_quantize(q, k, v, 64, 64, precision=precision, smooth_k=False)
    back = dequantize(quantized, 64, 64)
    for x, y, step in zip((q, k, v), back, (1 / 254, 1 / 254, 2**-4)):
        limit = x.abs().max() * step * 1.01 if precision == "int8_fp8" or x is not v else 0
        assert (x.transpose(1, 2) - y[:, :, :100]).abs().max() <= limit


def check(device, precision, dtype, backend, **case):
    q, k, v, mask, rows, hide, visible = build(**{"dim": 64, **case}, dtype=dtype)
    # An offset common to all keys must change nothing but the log-sum-exp, which must follow it.
    k = k + 3 * torch.randn(1, 1, k.shape[2], k.shape[3]).to(dtype)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    fake = quantized_block_sparse_attention(
        q, k, v, mask, precision=precision, rows=rows, key_mask=hide, return_lse=True, backend="reference"
    )
    moved_inputs = moved(device, q, k, v, mask, rows, hide)
    out, lse = quantized_block_sparse_attention(
        *moved_inputs[:4],
        precision=precision,
        rows=moved_inputs[4],
        key_mask=moved_inputs[5],
        return_lse=True,
        backend=backend,
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


@pytest.mark.parametrize("case", CASES)
def test_int8_matches_dequantised_attention(case, device):
    check(device, "int8", torch.float16, "triton", **CASES[case])


@pytest.mark.parametrize("case", ["ragged", "rows_key_mask"])
def test_fp8_matches_dequantised_attention(case, device):
    check(device, "int8_fp8", torch.float16, "triton", **CASES[case])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128, 128), (128, 64, 128), (128, 128, 64), (64, 64, 96)], ids=str)
@pytest.mark.parametrize("case", GPU_CASES)
def test_compiled(case, shape, dtype, precision, device):
    check(device, precision, dtype, "triton", **GPU_CASES[case], block=shape[:2], dim=shape[2])


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
