"""The public operation on the reference and gather backends against an independent fp64 oracle."""

import subprocess
import sys

import pytest
import torch

from dit_accel.kernels import BlockMask, block_sparse_attention, choose_backend

from .operations import CountedOperations
from .oracle import (
    UNIT_ROUNDOFF,
    assert_close,
    dense_attention,
    random_mask,
    random_rows,
    visible_tokens,
)

BACKENDS = ["reference", "torch"]
CASES = {
    "plain": {},
    "ragged": {"length": 203},
    "one_block": {"length": 20},
    "blocks_128x64": {"block": (128, 64), "length": 300},
    "blocks_64x128": {"block": (64, 128), "length": 300},
    "blocks_16x16": {"block": (16, 16), "length": 90, "rows": (1, 3)},
    "blocks_32x16": {"block": (32, 16), "length": 90},
    "batch_2_masks_per_head": {"batch": 2, "lead": (2, 3), "length": 203},
    "mask_shared_by_batch": {"batch": 2, "lead": (1, 3)},
    "mask_shared_by_heads": {"batch": 2, "lead": (2, 1)},
    "rows_per_head": {"batch": 2, "lead": (2, 3), "rows": (2, 3), "length": 203},
    "rows_shared": {"batch": 2, "lead": (1, 1), "rows": (1, 1), "length": 203},
    "key_mask": {"batch": 2, "lead": (2, 3), "key_mask": True},
    "key_mask_shared_mask": {"batch": 2, "lead": (1, 3), "key_mask": True, "length": 203},
    "key_mask_rows": {"batch": 2, "lead": (2, 3), "key_mask": True, "rows": (2, 3), "length": 203},
    "bits": {"bits": True, "length": 203},
    "bits_rows_key_mask": {"bits": True, "rows": (1, 3), "key_mask": True, "lead": (1, 3)},
    "empty_rows": {"empty_rows": True, "length": 203},
    "more_keys_than_queries": {"length": 100, "kv_length": 230},
    "head_dim_72": {"dim": 72},
}


def build(
    length=256,
    kv_length=None,
    batch=1,
    heads=3,
    dim=32,
    block=(64, 64),
    lead=None,
    rows=None,
    key_mask=False,
    bits=False,
    empty_rows=False,
    dtype=torch.float32,
):
    torch.manual_seed(7)
    kv_length = kv_length or length
    q = torch.randn(batch, length, heads, dim).to(dtype)
    k, v = (torch.randn(batch, kv_length, heads, dim).to(dtype) for _ in range(2))
    rows = None if rows is None else random_rows(rows, length)
    hide = None
    if key_mask:
        hide = torch.ones(batch, kv_length, dtype=torch.bool)
        hide[0, kv_length - 37 :] = False
        hide[-1, 3:90:2] = False
    mask = random_mask(
        lead or (1, heads),
        length,
        kv_length,
        *block,
        key_mask=hide,
        rows=rows,
        bits=bits,
        empty_rows=empty_rows,
    )
    return q, k, v, mask, rows, hide, visible_tokens(mask, hide, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_oracle(case, backend):
    q, k, v, mask, rows, hide, visible = build(**CASES[case])
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    eager, eager_lse = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    out, lse = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, return_lse=True, backend=backend)
    only = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, backend=backend)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_close(out, exact, eager, torch.float32, "out with lse")
    assert_close(only, exact, eager, torch.float32, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert torch.all(lse[~seen] == -torch.inf)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
    hidden = ~seen.transpose(1, 2)
    assert torch.all(out[hidden] == 0)
    assert torch.all(only[hidden] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend):
    q, k, v, mask, rows, _hide, visible = build(length=203, rows=(1, 3), bits=True, dtype=torch.float64)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    out, lse = block_sparse_attention(q, k, v, mask, rows=rows, return_lse=True, backend=backend)
    only = block_sparse_attention(q, k, v, mask, rows=rows, backend=backend)
    # Sums of up to 203 products: 203 roundings bound the error of any summation order.
    bound = 203 * UNIT_ROUNDOFF[torch.float64] * 4
    for result in (out, only):
        assert (result - exact).abs().max() < bound
    seen = exact_lse.isfinite()
    assert (lse - exact_lse)[seen].abs().max() < bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, backend):
    q, k, v, mask, rows, hide, visible = build(
        length=203, batch=2, lead=(2, 3), rows=(2, 3), key_mask=True, dtype=dtype
    )
    exact, _ = dense_attention(q, k, v, visible, rows)
    eager, _ = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    # What a kernel in this dtype may lose: probabilities and output are each rounded once.
    eager = eager + UNIT_ROUNDOFF[dtype] * v.abs().amax()
    out = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, backend=backend)
    assert out.dtype == dtype
    assert_close(out, exact, eager, dtype, "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_exp_of_float16_is_as_exact_as_that_of_float32(backend):
    q, k, v, mask, rows, hide, visible = build(
        length=203, batch=2, lead=(2, 3), rows=(2, 3), key_mask=True, dtype=torch.float16
    )
    _, exact = dense_attention(q, k, v, visible, rows)
    _, eager = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    _, lse = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, return_lse=True, backend=backend)
    seen = exact.isfinite()
    assert lse.dtype == torch.float32
    assert_close(lse[seen], exact[seen], eager[seen], torch.float32, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_equal_contiguous_ones(backend):
    _, _, _, mask, rows, _, _ = build(length=203, rows=(1, 3))
    packed = torch.randn(1, 3, 203, 3, 40)
    q, k, v = (packed[:, i, :, :, 4:36] for i in range(3))
    strided = block_sparse_attention(q, k, v, mask, rows=rows, backend=backend)
    plain = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), mask, rows=rows, backend=backend)
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_a_materialised_reorder(backend):
    q, k, v, mask, rows, _, _ = build(length=203, rows=(1, 3))
    index = rows.long().transpose(1, 2)[..., None].expand_as(q)
    moved = [x.gather(1, index) for x in (q, k, v)]
    expected, expected_lse = block_sparse_attention(*moved, mask, return_lse=True, backend=backend)
    out, lse = block_sparse_attention(q, k, v, mask, rows=rows, return_lse=True, backend=backend)
    if backend == "torch":
        assert torch.equal(out.gather(1, index), expected)
        assert torch.equal(lse.gather(2, rows.long().expand_as(lse)), expected_lse)
    else:  # the reference sums in the original key order
        torch.testing.assert_close(out.gather(1, index), expected, rtol=0, atol=203 * 2.0**-24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    q, k, v, mask, _, _, visible = build()
    exact, _ = dense_attention(q, k, v, visible, scale=0.31)
    eager, _ = dense_attention(q, k, v, visible, scale=0.31, dtype=torch.float32)
    assert_close(block_sparse_attention(q, k, v, mask, scale=0.31, backend=backend), exact, eager, torch.float32, "out")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_propagates_to_the_rows_that_see_it(which, backend):
    q, k, v, mask, _, _, visible = build(length=256)
    {"q": q, "k": k, "v": v}[which][0, 70, 1, 5] = float("nan")
    out = block_sparse_attention(q, k, v, mask, backend=backend)
    touched = out[0].isnan().any(-1).transpose(0, 1)
    expected = torch.zeros_like(touched)
    if which == "q":
        expected[1, 70] = True
    else:
        expected[1] = visible[0, 1, :, 70]
    assert expected.any()
    assert torch.equal(touched & expected, expected)
    assert not touched[[0, 2]].any()
    if backend == "torch":  # blocks that are not listed are not read
        assert torch.equal(touched, expected)


@pytest.mark.parametrize("case", ["ragged", "rows_per_head", "bits_rows_key_mask", "empty_rows", "head_dim_72"])
def test_gather_gradients(case):
    q, k, v, mask, rows, hide, visible = build(**CASES[case], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    weight = torch.randn_like(exact_lse)
    seen = exact_lse.isfinite()
    wanted = torch.autograd.grad(exact, inputs, grad, retain_graph=True)
    wanted_lse = torch.autograd.grad((exact_lse * weight)[seen].sum(), inputs[:2])
    out = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, backend="torch")
    got = torch.autograd.grad(out, inputs, grad)
    _, lse = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, return_lse=True, backend="torch")
    got_lse = torch.autograd.grad((lse * weight)[seen].sum(), inputs[:2])
    for actual, exact_grad in zip((*got, *got_lse), (*wanted, *wanted_lse)):
        assert actual.isfinite().all()
        bound = 1024 * UNIT_ROUNDOFF[torch.float64] * max(1.0, exact_grad.abs().max().item())
        assert (actual - exact_grad).abs().max() < bound


def test_gather_result_does_not_depend_on_the_chunk_size(monkeypatch):
    from dit_accel.kernels.attention import gather

    q, k, v, mask, _, _, visible = build(length=203, batch=2, lead=(2, 3), empty_rows=True)
    exact, _ = dense_attention(q, k, v, visible)
    eager, _ = dense_attention(q, k, v, visible, dtype=torch.float32)
    for size, rows in ((1, 1), (1, 4), (1 << 30, 1000)):
        monkeypatch.setattr(gather, "_CHUNK_BYTES_CPU", size)
        monkeypatch.setattr(gather, "_MIN_ROWS", rows)
        out = block_sparse_attention(q, k, v, mask, backend="torch")
        assert_close(out, exact, eager, torch.float32, f"chunk {size}, rows {rows}")


@pytest.mark.parametrize("lists", ["of_one_length", "of_two_lengths", "permuted", "ragged"])
def test_gather_attends_once_for_all_lists_of_a_length(lists):
    """Operations are parallel regions, which cost a busy machine more than their work."""
    torch.manual_seed(0)
    length = 2000 if lists == "ragged" else 2048
    keep = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    keep[..., :8] = True
    keep[..., 16:, 8] = lists == "of_two_lengths"
    mask = BlockMask.from_dense(keep, 64, 64, length, length)
    q, k, v = (torch.randn(1, length, 2, 64) for _ in range(3))
    rows = random_rows((1, 2), length) if lists == "permuted" else None
    with CountedOperations() as counted:
        block_sparse_attention(q, k, v, mask, rows=rows, backend="torch")
    attended = counted.names["_scaled_dot_product_flash_attention_for_cpu"]
    assert attended == (2 if lists == "of_two_lengths" else 1)


def test_gather_chunks_count_what_they_hold(monkeypatch):
    """Scores and token bits take several times the memory of the gathered blocks."""
    from dit_accel.kernels.attention import gather

    held = []
    attend = gather._attend_chunk
    monkeypatch.setattr(gather, "_attend_chunk", lambda *args: held.append(args[4]) or attend(*args))
    monkeypatch.setattr(gather, "_CHUNK_BYTES_CPU", 1 << 20)
    pairs = {}
    for name, case, return_lse in (("plain", {}, False), ("lse", {}, True), ("bits", {"bits": True}, False)):
        q, k, v, mask, *_ = build(length=2048, dim=16, **case)
        held.clear()
        block_sparse_attention(q, k, v, mask, return_lse=return_lse, backend="torch")
        pairs[name] = max(len(chunk.row_ids) * chunk.count for chunk in held)
    assert pairs["plain"] * 2 * 64 * 16 * 4 <= 1 << 20
    assert pairs["lse"] * (2 * 64 * 16 * 4 + 64 * 64 * 8) <= 1 << 20
    assert pairs["bits"] * (2 * 64 * 16 * 4 + 64 * 64 * 8) <= 1 << 20


def test_gather_reads_only_kept_blocks():
    q, k, v, mask, _, _, _ = build(length=256)
    expected = block_sparse_attention(q, k, v, mask, backend="torch")
    keep = mask.to_dense().any(2)
    poisoned = [x.clone() for x in (k, v)]
    unread = ~keep[0].repeat_interleave(64, -1).transpose(0, 1)
    if not unread.any():
        dense = mask.to_dense()
        dense[:, 0, :, 2] = False
        mask = BlockMask.from_dense(dense, 64, 64, 256, 256)
        expected = block_sparse_attention(q, k, v, mask, backend="torch")
        unread = ~dense.any(2)[0].repeat_interleave(64, -1).transpose(0, 1)
    for x in poisoned:
        x[0][unread] = float("nan")
    assert torch.equal(block_sparse_attention(q, *poisoned, mask, backend="torch"), expected)


def test_gather_reads_only_kept_blocks_where_lists_differ_in_length():
    """Rows whose lists run together are filled up; what they are filled up with must be theirs."""
    keep = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    keep[0, 0, 0, 1], keep[0, 0, 1, 1:3], keep[0, 0, 2, 2:6], keep[0, 0, 3, [1, 4, 5]] = True, True, True, True
    for kv_length in (96, 90):  # with a short last block too
        torch.manual_seed(3)
        q = torch.randn(1, 64, 1, 32)
        k, v = torch.randn(2, 1, kv_length, 1, 32)
        mask = BlockMask.from_dense(keep, 16, 16, 64, kv_length)
        expected = block_sparse_attention(q, k, v, mask, return_lse=True, backend="torch")
        k[:, :16], v[:, :16] = float("nan"), float("nan")
        found = block_sparse_attention(q, k, v, mask, return_lse=True, backend="torch")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = block_sparse_attention(*inputs, mask, backend="torch")
        grads = torch.autograd.grad(out.sum(), inputs)
        assert not any(x.isnan().any() for x in grads)
        assert not any(x[:, :16].any() for x in grads[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("hidden", ["no block is listed", "every key is hidden", "one row reads"])
def test_gradients_where_little_or_nothing_is_read(hidden, permuted, backend):
    keep = torch.full((1, 1, 3, 3), hidden == "every key is hidden")
    keep[..., 1, 2] = hidden != "no block is listed"
    key_mask = torch.zeros(2, 48, dtype=torch.bool) if hidden == "every key is hidden" else None
    partial = torch.ones_like(keep) if key_mask is not None else None
    mask = BlockMask.from_dense(keep, 16, 16, 48, 48, partial=partial)
    rows = random_rows((1, 2), 48) if permuted else None
    inputs = [torch.randn(2, 48, 2, 16, requires_grad=True) for _ in range(3)]
    out, lse = block_sparse_attention(*inputs, mask, rows=rows, key_mask=key_mask, return_lse=True, backend=backend)
    seen = lse.isfinite()
    assert bool(seen.any()) == (hidden == "one row reads")
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), seen.float()))
    only = torch.autograd.grad(
        block_sparse_attention(*inputs, mask, rows=rows, key_mask=key_mask, backend=backend).sum(), inputs
    )
    for both, one in zip(grads, only):
        assert both.isfinite().all()
        assert one.isfinite().all()
        if hidden != "one row reads":
            assert not both.any()
            assert not one.any()
    assert (out == 0)[~seen.transpose(1, 2)].all()


def test_automatic_choice_on_a_cpu_is_torch_with_a_reason():
    q, k, v, mask, *_ = build()
    name, reason = choose_backend(q, k, v, mask)
    assert name == "torch"
    assert "triton" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(256, 3, 32)}, r"\[B, S, H, D\]"),
        ({"k": torch.zeros(1, 256, 3, 16), "v": torch.zeros(1, 256, 3, 16)}, "head dim"),
        ({"v": torch.zeros(1, 255, 3, 32)}, "one shape"),
        ({"v": torch.zeros(1, 256, 3, 32, dtype=torch.float16)}, "one floating-point dtype"),
        ({"q": torch.zeros(1, 200, 3, 32)}, "256 queries"),
        ({"rows": torch.zeros(1, 3, 200, dtype=torch.int32)}, "permute 256 tokens"),
        ({"rows": torch.zeros(1, 3, 256)}, "int32 or int64"),
        ({"rows": torch.zeros(3, 256, dtype=torch.int32)}, "rows must be"),
        ({"key_mask": torch.ones(1, 256)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(2, 256, dtype=torch.bool)}, "key_mask must be bool"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"scale": -0.1}, "scale must be positive and finite, got -0.1"),
        ({"scale": 0.0}, "scale must be positive and finite"),
        ({"scale": float("nan")}, "scale must be positive and finite"),
        ({"scale": float("inf")}, "scale must be positive and finite"),
        ({"k": torch.zeros(1, 256, 3, 32, device="meta"), "v": torch.zeros(1, 256, 3, 32)}, "device"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, mask, *_ = build()
    call = {"q": q, "k": k, "v": v, "mask": mask, **change}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**call)


def test_import_takes_no_triton():
    code = "import sys, dit_accel.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mask_with_wrong_heads_is_named():
    q, k, v, *_ = build()
    mask = random_mask((1, 2), 256, 256, 64, 64)
    with pytest.raises(ValueError, match="heads"):
        block_sparse_attention(q, k, v, mask)


def test_named_backend_that_cannot_run_says_why(device):
    q, k, v, mask = (x.to(device) for x in build(dtype=torch.float64)[:4])
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        block_sparse_attention(q, k, v, mask, backend="triton")
