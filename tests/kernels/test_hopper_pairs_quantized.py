"""Blocks of 64 queries in the Hopper kernel in 8 bits, against the same numbers in float32; most needs the GPU."""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockMask, quantized_block_sparse_attention
from dit_accel.kernels.attention import variants

from .oracle import UNIT_ROUNDOFF, assert_close
from .test_block_sparse import build
from .test_hopper import CASES, wrong_tiles
from .test_hopper_pairs import LISTS, SHAPES, lists

PRECISIONS = ["int8", "int8_fp8"]


def quantized_call(q, k, v, mask, rows, hide, precision, device, key_scales="block", **changes):
    """A call of the kernel as a function, the same in float32, and the tensors on the device."""
    from dit_accel.kernels.attention.hopper.forward import PAIR_KEYS, default_config, hopper_forward
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    q, k, v, mask, rows, hide = (None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide))
    ready = quantize_inputs(q, k, v, 64, mask.block_k, precision=precision, rows=rows, key_scales=key_scales)
    dim = q.shape[-1]
    config = replace(default_config(PAIR_KEYS, dim, precision, rows is not None, pairs=True), **changes)

    def kernel():
        # Freed memory of the outputs' sizes, so that what no program writes shows.
        poison = [torch.full_like(q, 777.0), torch.full((q.shape[0], *q.shape[2:0:-1]), 777.0, device=q.device)]
        del poison
        return hopper_forward(q, k, v, mask, rows, hide, dim**-0.5, quantized=ready, config=config)

    def reference():
        return quantized_block_sparse_attention(
            q, k, v, mask, rows=rows, key_mask=hide, precision=precision, return_lse=True, backend="reference",
            quantized=ready,
        )  # fmt: skip

    return kernel, reference


def check(q, k, v, mask, rows, hide, precision, device, lse_error=1e-4, **options):
    """From the same 8-bit numbers, with a rounding of the weights (e4m3 keeps 4 bits) and one of the output.

    Of values at random the sum of weighted errors is to the sum of weighted values as a weight's error to the weight.
    Twice the same bits. ``lse_error``: of a log-sum-exp in float32.
    """
    kernel, reference = quantized_call(q, k, v, mask, rows, hide, precision, device, **options)
    (out, lse), (again, lse_again) = kernel(), kernel()
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    exact, exact_lse = reference()
    rounding = 2.0**-4 if precision == "int8_fp8" else UNIT_ROUNDOFF[q.dtype]
    assert_close(out, exact, exact.double() + rounding / 2 * v.double().abs().amax().item(), q.dtype, "out")
    error = (out.double() - exact.double()).norm() / exact.double().norm()
    assert error <= rounding + UNIT_ROUNDOFF[q.dtype]
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert torch.all(lse[~seen] == -torch.inf)
    torch.testing.assert_close(lse[seen], exact_lse[seen], rtol=0, atol=lse_error)
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_scales", ["block", "thread"])
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
def test_matches_the_same_numbers_in_float32(turns, key_scales, case, shape, precision, device):
    block_k, dim = shape
    built = build(block=(64, block_k), dim=dim, dtype=torch.bfloat16, **CASES[case])
    check(*built[:6], precision, device, key_scales=key_scales, take_turns=turns)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_float16_outputs(precision, device):
    check(*build(block=(64, 64), dim=128, dtype=torch.float16, length=1000)[:6], precision, device)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2500, 2570], ids=["even", "odd"])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lists_of_a_pair_that_agree_or_differ(precision, name, permuted, block_k, length, device):
    heads = 3
    q, k, v, _, rows, _, _ = build(
        length=length, heads=heads, block=(64, block_k), dim=128, dtype=torch.bfloat16,
        rows=(1, 3) if permuted else None,
    )  # fmt: skip
    keep = lists(name, heads, -(-length // 64), -(-length // block_k))
    mask = BlockMask.from_dense(keep, 64, block_k, length, length, backend="torch")
    check(q, k, v, mask, rows, None, precision, device)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_number_of_buffers_has_the_same_bits(precision, device):
    built = build(length=3000, block=(64, 64), dim=128, dtype=torch.bfloat16, empty_rows=True)[:6]
    want, want_lse = quantized_call(*built, precision, device)[0]()
    for stages in (3, 4, 6):
        for turns in (False, True):
            got, lse = quantized_call(*built, precision, device, stages=stages, take_turns=turns)[0]()
            assert torch.equal(got, want)
            assert torch.equal(lse, want_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("slope", [30.0, 400.0])
@pytest.mark.parametrize("case", ["plain", "bits_rows_key_mask"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_whose_logits_rise_or_fall_from_block_to_block(precision, case, slope, device):
    """As in test_hopper.py: a row's reference is raised late."""
    q, k, v, mask, rows, hide, _ = build(block=(64, 64), dim=128, dtype=torch.bfloat16, **CASES[case])
    length = k.shape[1]
    q[..., 0] = torch.linspace(-1, 1, length).view(1, -1, 1)
    octave = 1 / (1.4426950408889634 * 128**-0.5)
    k[..., 0] = (torch.arange(length) / length).view(1, -1, 1) * slope * octave
    # A logit of hundreds in float32, times a few roundings.
    check(q, k, v, mask, rows, hide, precision, device, lse_error=8 * slope * 2.0**-24 + 1e-4)


MANY_CALLS = {
    # name: (keys a block, head dim, settings)
    "in_order": (64, 128, {"heads": 4, "batch": 2, "empty_rows": True}),
    "in_order_small_heads": (64, 64, {"heads": 4, "batch": 2}),
    "rows": (128, 128, {"heads": 4, "batch": 2, "rows": (1, 4), "empty_rows": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", MANY_CALLS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_calls_have_the_same_bits(precision, case, device):
    """More tiles than multiprocessors, over and over: a race of the queue or of a buffer is rare."""
    block_k, dim, settings = MANY_CALLS[case]
    built = build(length=6000, block=(64, block_k), dim=dim, dtype=torch.bfloat16, **settings)[:6]
    kernel, _ = quantized_call(*built, precision, device)
    want, want_lse = kernel()
    cold = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    for number in range(300):
        if number % 4 == 0:
            cold.zero_()
        out, lse = kernel()
        wrong = (out != want).any(-1).transpose(1, 2) | (lse != want_lse)
        assert not wrong.any(), f"call {number}: {wrong_tiles(wrong, lse, built[4])}"


@pytest.mark.gpu
def test_nan_in_a_value_reaches_the_rows_that_see_it_and_no_others(device):
    """A block that only the other query block of a pair reads, above all."""
    q, k, v, mask, _, _, visible = build(length=1000, block=(64, 64), dim=128, dtype=torch.bfloat16)
    v[0, 170, 1, 5] = float("nan")
    out, _ = quantized_call(q, k, v, mask, None, None, "int8", device)[0]()
    expected = torch.zeros(1000, 3, dtype=torch.bool)
    expected[:, 1] = visible[0, 1, :, 170]
    assert expected.any()
    assert torch.equal(out[0].isnan().any(-1).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_what_the_operation_runs(precision, device):
    built = build(length=1000, block=(64, 64), dim=128, dtype=torch.bfloat16, rows=(1, 3))[:6]
    want, _ = quantized_call(*built, precision, device)[0]()
    q, k, v, mask, rows, _ = (None if x is None else x.to(device) for x in built)
    assert variants.why_not_hopper_quantized(q, mask, smooth_q=False) is None
    assert torch.equal(quantized_block_sparse_attention(q, k, v, mask, rows=rows, precision=precision), want)


def test_no_call_runs_it_where_nobody_has_timed_it(monkeypatch):
    monkeypatch.setattr(variants, "_why_not_gluon", lambda q: None)
    why = {}
    for dim in (64, 128):
        q, _, _, mask, _, _, _ = build(length=256, block=(64, 64), dim=dim, dtype=torch.bfloat16)
        why[dim] = variants.why_not_hopper_quantized(q, mask, smooth_q=False)
    assert why[64] == "its 8-bit form for blocks of 64 queries has not been timed at head dim 64"
    assert why[128] == "it needs a GPU of compute capability 9.0"
