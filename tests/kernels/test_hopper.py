"""The Hopper kernel against the fp64 oracle, on the GPU; without one test_hopper_interpreted.py runs its IR."""

from dataclasses import replace

import pytest
import torch

from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention
from .test_block_sparse import build

pytestmark = pytest.mark.gpu

CASES = {
    "plain": {"length": 1024},
    "ragged": {"length": 1000},
    "short": {"length": 90},
    "rows": {"length": 1000, "rows": (1, 3)},
    "rows_batch": {"length": 1000, "rows": (2, 3), "lead": (2, 3), "batch": 2},
    "shared_mask": {"length": 1000, "lead": (1, 1), "batch": 2},
    "key_mask": {"length": 1000, "lead": (2, 3), "batch": 2, "key_mask": True},
    "bits_rows_key_mask": {"length": 1000, "bits": True, "rows": (1, 3), "key_mask": True, "lead": (1, 3)},
    "empty_rows": {"length": 1000, "empty_rows": True},
    "many_tiles": {"length": 6000, "heads": 4},
    "many_tiles_rows": {"length": 6000, "heads": 4, "rows": (1, 4), "batch": 2, "empty_rows": True},
    "more_keys": {"length": 500, "kv_length": 3000},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
def test_matches_oracle(turns, case, shape, dtype, device):
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward, why_not_hopper

    block_k, dim = shape
    settings = {"block": (128, block_k), "dim": dim, "dtype": dtype, **CASES[case]}
    q, k, v, mask, rows, hide, visible = build(**settings)
    moved = [None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide)]
    reason = why_not_hopper(*moved[:4], moved[4])
    if reason is not None and "9.0" in reason:
        pytest.skip(reason)
    assert reason is None
    visible = visible.to(device)
    exact, exact_lse = dense_attention(*moved[:3], visible, moved[4])
    eager, eager_lse = dense_attention(*moved[:3], visible, moved[4], dtype=torch.float32)
    eager = eager + UNIT_ROUNDOFF[dtype] * v.double().abs().amax()
    scale = dim**-0.5
    config = replace(default_config(block_k, dim, None, rows is not None), take_turns=turns)
    first, second = (hopper_forward(*moved, scale, config=config) for _ in range(2))
    assert torch.equal(first[0], second[0])
    out, lse = first
    assert_close(out, exact, eager, dtype, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("slope", [30.0, 100.0, 400.0, 3000.0])
@pytest.mark.parametrize("level", [0.0, -500.0])
@pytest.mark.parametrize("case", ["plain", "bits_rows_key_mask"])
def test_rows_whose_logits_rise_or_fall_from_block_to_block(case, level, slope, shape, dtype, device):
    """A row's reference is raised late: neither may weights overflow nor what came before be counted wrongly.

    ``slope``: by how many octaves the logits of the first and last query change from the first key to the last. Over a
    block that is less than what a reference may lag, more, and more than a float holds.
    """
    from dit_accel.kernels.attention.hopper.forward import hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    block_k, dim = shape
    q, k, v, mask, rows, hide, visible = build(block=(128, block_k), dim=dim, dtype=dtype, **CASES[case])
    length = k.shape[1]
    # The first channel has a row's slope (some rise, some fall), the second the level.
    q[..., 0] = torch.linspace(-1, 1, length).view(1, -1, 1)
    q[..., 1] = 8.0
    octave = 1 / (1.4426950408889634 * dim**-0.5)
    k[..., 0] = (torch.arange(length) / length).view(1, -1, 1) * slope * octave
    k[..., 1] = level * octave / 8.0
    q, k, v, mask, rows, hide = (None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide))
    visible = visible.to(device)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    eager, eager_lse = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    eager = eager + UNIT_ROUNDOFF[dtype] * v.double().abs().amax()
    out, lse = hopper_forward(q, k, v, mask, rows, hide, dim**-0.5)
    assert_close(out, exact, eager, dtype, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")


@pytest.mark.parametrize("lead", [(1, 1), (1, 5), (2, 5)], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (64, 128), (64, 64)], ids=str)
def test_a_ring_of_any_size_and_rows_that_lie_anywhere_have_the_same_bits(shape, lead, device):
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    block_k, dim = shape
    settings = {"length": 3600, "heads": 5, "batch": 2, "lead": lead, "rows": lead, "key_mask": True}
    q, k, v, mask, rows, hide, visible = build(
        **settings, block=(128, block_k), dim=dim, dtype=torch.bfloat16, empty_rows=True
    )
    q, k, v, mask, rows, hide = (x.to(device) for x in (q, k, v, mask, rows, hide))
    config = default_config(block_k, dim, None, permuted=True)
    whole = hopper_forward(q, k, v, mask, rows, hide, 0.1, config=replace(config, ring=5))
    # One batch entry: the oracle's matrices are large.
    exact, _ = dense_attention(*(x[:1] for x in (q, k, v, visible.to(device), rows)), scale=0.1)
    assert (whole[0][:1].double() - exact).norm() <= 1e-2 * exact.norm()
    together = torch.stack([k, v], 2)[:, :, 0], torch.stack([k, v], 2)[:, :, 1]  # rows twice as far apart
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # heads not side by side
    apart = k, together[1]  # rows that do not lie alike
    for ring, (keys, values) in ((1, (k, v)), (2, together), (3, by_head), (4, apart), (9, (k, v))):
        got = hopper_forward(q, keys, values, mask, rows, hide, 0.1, config=replace(config, ring=ring))
        assert torch.equal(got[0], whole[0])
        assert torch.equal(got[1], whole[1])


def test_permuted_calls_on_several_streams_do_not_wait_for_each_other(device):
    """Programs wait for what others have moved; those that wait must not keep the others from running."""
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    q, k, v, mask, rows, _, _ = build(
        length=3000, heads=16, block=(128, 64), dim=128, dtype=torch.bfloat16, rows=(1, 16)
    )
    q, k, v, mask, rows = (x.to(device) for x in (q, k, v, mask, rows))
    config = replace(default_config(64, 128, None, permuted=True), ring=1)
    want = hopper_forward(q, k, v, mask, rows, None, 0.1, config=config)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outputs = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(hopper_forward(q, k, v, mask, rows, None, 0.1, config=config)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outputs)


MANY_CALLS = {
    # name: (keys a block, head dim, settings)
    "rows": (64, 128, {"heads": 4, "batch": 2, "rows": (1, 4), "empty_rows": True}),
    "rows_one_launch": (64, 128, {"heads": 6, "rows": (1, 6)}),
    "rows_narrow_ring": (128, 64, {"heads": 9, "rows": (1, 9), "empty_rows": True}),
    "rows_wide_blocks": (128, 128, {"heads": 4, "batch": 2, "rows": (1, 4)}),
    "rows_small_heads": (64, 64, {"heads": 4, "batch": 2, "rows": (1, 4)}),
    "in_order": (64, 128, {"heads": 4, "batch": 2, "empty_rows": True}),
    "in_order_wide_blocks": (128, 128, {"heads": 4, "batch": 2, "empty_rows": True}),
}


@pytest.mark.parametrize("case", MANY_CALLS)
def test_many_calls_have_the_same_bits(case, device):
    """More tiles than multiprocessors, over and over: a race of the queue or of a buffer is rare."""
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    block_k, dim, settings = MANY_CALLS[case]
    q, k, v, mask, rows, _, _ = build(length=6000, block=(128, block_k), dim=dim, dtype=torch.bfloat16, **settings)
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    rows = None if rows is None else rows.to(device)
    config = replace(default_config(block_k, dim, None, rows is not None), ring=1 if "narrow" in case else None)
    want, want_lse = hopper_forward(q, k, v, mask, rows, None, dim**-0.5, config=config)
    cold = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    for number in range(400):
        # Freed memory of the outputs' sizes, so that what no program writes shows.
        poison = [torch.full_like(x, 777.0) for x in (want, want_lse)]
        del poison
        if number % 4 == 0:
            cold.zero_()
        out, lse = hopper_forward(q, k, v, mask, rows, None, dim**-0.5, config=config)
        wrong = (out != want).any(-1).transpose(1, 2) | (lse != want_lse)
        assert not wrong.any(), f"call {number}: {wrong_tiles(wrong, lse, rows)}"


def wrong_tiles(wrong, lse, rows):
    """Of each head with wrong rows: (batch, head), their number, how many were never written, and their tiles."""
    found = []
    for b, h in wrong.any(-1).nonzero().tolist():
        at = wrong[b, h].nonzero()[:, 0]
        places = at if rows is None else rows[min(b, len(rows) - 1), min(h, rows.shape[1] - 1)].long().argsort()[at]
        tiles = sorted({place // 64 / 2 for place in places.tolist()})
        found.append(((b, h), len(at), int((lse[b, h] == 777.0).sum()), tiles[:8]))
    return found


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_scales", ["block", "thread"])
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
def test_agrees_with_the_portable_one_on_quantised_inputs(turns, key_scales, case, shape, precision, device):
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward
    from dit_accel.kernels.quantized.triton.forward import quantized_forward
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    block_k, dim = shape
    settings = {"block": (128, block_k), "dim": dim, "dtype": torch.bfloat16, **CASES[case]}
    q, k, v, mask, rows, hide, _ = build(**settings)
    q, k, v, mask, rows, hide = (None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide))
    ready = quantize_inputs(q, k, v, 128, block_k, precision=precision, rows=rows, key_scales=key_scales)
    scale = dim**-0.5
    config = replace(default_config(block_k, dim, precision), take_turns=turns)
    out, lse = hopper_forward(q, k, v, mask, rows, hide, scale, quantized=ready, config=config)
    expected, expected_lse = quantized_forward(ready, mask, rows, hide, scale, q.shape[2], q.dtype)
    # The same numbers in another order: a rounding of the weights (e4m3 keeps 4 bits) and of the output.
    rounding = 2.0**-4 if precision == "int8_fp8" else UNIT_ROUNDOFF[torch.bfloat16]
    assert (out.float() - expected.float()).abs().max() <= 2 * rounding * v.float().abs().amax()
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it_and_no_others(which, device):
    from dit_accel.kernels.attention.hopper.forward import hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    q, k, v, mask, _, _, visible = build(length=1000, block=(128, 128), dim=128, dtype=torch.bfloat16)
    {"q": q, "k": k, "v": v}[which][0, 170, 1, 5] = float("nan")
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    out, _ = hopper_forward(q, k, v, mask, None, None, 0.1)
    expected = torch.zeros(1000, 3, dtype=torch.bool)
    if which == "q":
        expected[170, 1] = True
    else:
        expected[:, 1] = visible[0, 1, :, 170]
    assert expected.any()
    assert torch.equal(out[0].isnan().any(-1).cpu(), expected)
