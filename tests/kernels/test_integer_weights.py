"""Integer weights and values against integer arithmetic on dense fp64 probabilities, tile by tile."""

import pytest
import torch

from dit_accel.kernels import quantize_inputs, quantized_block_sparse_attention
from dit_accel.kernels.common.quantized_inputs import INTEGER_VALUES, dequantize

from .oracle import dense_attention, on_cpu, permute, unpermute
from .test_block_sparse import build

CASES = {
    "ragged": {"length": 203},
    "blocks_128x64": {"block": (128, 64), "length": 300},
    "rows_key_mask": {"batch": 2, "lead": (2, 3), "key_mask": True, "rows": (2, 3), "length": 203},
    "bits": {"bits": True, "length": 203},
    "empty_rows": {"empty_rows": True, "length": 203},
    "more_keys": {"length": 100, "kv_length": 230},
}


def integer_oracle(quantized, mask, visible, rows, scale):
    """Probabilities in float64, rounded tile by tile; integer products in int64.

    Also the relative error to expect of independent roundings of the weights: uniform in half a step.
    """
    q, k, _ = dequantize(quantized, mask.block_k)
    q, k = q[:, :, : mask.q_len].double(), k[:, :, : mask.kv_len].double()
    if quantized.smooth_q:
        q = q + quantized.q_mean.double().repeat_interleave(mask.block_q, 2)[:, :, : mask.q_len]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible.expand(*q.shape[:2], -1, -1), -torch.inf)
    chances = torch.where(scores.isfinite().any(-1, keepdim=True), scores.softmax(-1), 0.0)
    values = quantized.v.long()
    out = torch.zeros(*q.shape[:3], values.shape[-1], dtype=torch.float64)
    noise = 0.0
    for i in range(mask.num_blocks[0]):
        for j in range(mask.num_blocks[1]):
            at_q = slice(i * mask.block_q, min((i + 1) * mask.block_q, mask.q_len))
            at_k = slice(j * mask.block_k, min((j + 1) * mask.block_k, mask.kv_len))
            tile = chances[:, :, at_q, at_k]
            step = tile.amax((-1, -2), keepdim=True) / 127
            noise += (step**2 / 12 * (tile > 0)).sum()
            whole = torch.where(step > 0, tile / step, 0.0).round().long()
            product = torch.einsum("bhqk,bhkd->bhqd", whole, values[:, :, at_k])
            out[:, :, at_q] += product * step * quantized.v_scale[:, :, j, None].double()
    return unpermute(out, rows).transpose(1, 2), (noise / chances.square().sum()).sqrt()


@pytest.mark.parametrize("smooth_q", [False, True])
@pytest.mark.parametrize("precision", list(INTEGER_VALUES))
@pytest.mark.parametrize("case", CASES)
def test_matches_integer_arithmetic(case, precision, smooth_q, device):
    q, k, v, mask, rows, hide, visible = build(**CASES[case], dim=64)
    k = k + 3 * torch.randn(1, 1, k.shape[2], k.shape[3])
    on = [None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide)]
    # On the device, whose sums in another order may round an integer up for down.
    sizes = (mask.block_q, mask.block_k)
    given = quantize_inputs(*on[:3], *sizes, precision=precision, rows=on[4], smooth_q=smooth_q)
    ready = on_cpu(given)
    assert ready.v.dtype == torch.int8
    assert ready.v.abs().max() == INTEGER_VALUES[precision]
    expected, weight_noise = integer_oracle(ready, mask, visible, rows, q.shape[-1] ** -0.5)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    out, lse = quantized_block_sparse_attention(
        *on[:4], precision=precision, rows=on[4], key_mask=on[5], return_lse=True, quantized=given
    )
    out, lse = out.cpu().double(), lse.cpu()
    # A probability that lies on a half in float32 and not in float64 may round the other way: one step of one
    # tile, 1/127 of its largest probability, and rare.
    assert (out - expected).norm() <= 1e-3 * expected.norm()
    assert ((out - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.02
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse - exact_lse)[seen].abs().max() <= 0.05
    assert torch.all(out[~seen.transpose(1, 2)] == 0)
    # Roundings of weights and values, and the target for INT8 queries and keys.
    stored = dequantize(ready, mask.block_k)[2][:, :, : mask.kv_len]
    original = v.transpose(1, 2) if rows is None else permute(v.transpose(1, 2), rows)
    value_noise = (stored - original).norm() / original.norm()
    error = (out - exact).norm() / exact.norm()
    assert error <= 1.1 * (weight_noise**2 + value_noise**2).sqrt() + 2e-2


def test_fewer_bits_lose_more():
    q, k, v, mask, *_, visible = build(length=203, dim=64)
    exact, _ = dense_attention(q, k, v, visible)
    errors = [
        (quantized_block_sparse_attention(q, k, v, mask, precision=name).double() - exact).norm()
        for name in ("int8", "int8_int8", "int8_int4")
    ]
    assert errors[0] < errors[1] < errors[2]


def test_there_is_no_kernel():
    q, k, v, mask, *_ = build()
    with pytest.raises(ValueError, match="integer weights have no kernel"):
        quantized_block_sparse_attention(q, k, v, mask, precision="int8_int4", backend="triton")
