"""The Triton backend, interpreted on a CPU and compiled on a GPU, against the independent fp64 oracle."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels import BlockMask, block_sparse_attention, choose_backend
from dit_accel.kernels.mask.transpose import transpose_mask

from .oracle import (
    UNIT_ROUNDOFF,
    assert_close,
    dense_attention,
    permute,
    random_mask,
    random_rows,
    visible_tokens,
)
from .test_block_sparse import CASES, build

GPU = torch.cuda.is_available()
HALF = [torch.float16, *([torch.bfloat16] if GPU else [])]  # the interpreter's bf16 dot is wrong
GRADIENT_CASES = [
    "ragged",
    "blocks_128x64",
    "blocks_64x128",
    "blocks_16x16",
    "blocks_32x16",
    "batch_2_masks_per_head",
    "mask_shared_by_batch",
    "rows_per_head",
    "key_mask_rows",
    "bits_rows_key_mask",
    "empty_rows",
    "more_keys_than_queries",
]


def on(device, *values):
    return [None if x is None else x.to(device) for x in values]


def run(device, q, k, v, mask, rows=None, hide=None):
    q, k, v, mask, rows, hide = on(device, q, k, v, mask, rows, hide)
    out, lse = block_sparse_attention(q, k, v, mask, rows=rows, key_mask=hide, return_lse=True, backend="triton")
    return out.cpu(), lse.cpu()


def check_forward(device, dtype, **case):
    q, k, v, mask, rows, hide, visible = build(**case, dtype=dtype)
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    eager, eager_lse = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    if dtype != torch.float32:
        # Probabilities are rounded to the dtype before the second product; no row sums to more than 1.
        eager = eager + UNIT_ROUNDOFF[dtype] * v.double().abs().amax()
    out, lse = run(device, q, k, v, mask, rows, hide)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(out, exact, eager, dtype, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert torch.all(lse[~seen] == -torch.inf)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.parametrize("case", CASES)
def test_forward_float32(case, device):
    check_forward(device, torch.float32, **CASES[case])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["ragged", "blocks_128x64", "key_mask_rows", "bits_rows_key_mask"])
def test_forward_half(case, dtype, device):
    check_forward(device, dtype, **CASES[case])


@pytest.mark.parametrize("dim", [40, 64, 72, 96, 128, 256])
def test_forward_head_dims(dim, device):
    check_forward(device, torch.float16, dim=dim, length=150, heads=2, rows=(1, 2))


@pytest.mark.parametrize("block", [(128, 128), (16, 16), (64, 32)], ids=str)
def test_forward_block_shapes(block, device):
    check_forward(device, torch.float16, block=block, length=300, heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64), (32, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_forward_compiled(block, dim, dtype, permuted, device):
    check_forward(
        device,
        dtype,
        block=block,
        dim=dim,
        length=1000,
        batch=2,
        rows=(2, 3) if permuted else None,
        lead=(2, 3),
    )


def test_strided_inputs_and_broadcast_gradient(device):
    _, _, _, mask, rows, _, _ = build(length=203, rows=(1, 3))
    packed = torch.randn(1, 203, 3, 3, 32)
    q, k, v = (packed[:, :, i] for i in range(3))
    plain = run(device, *(x.contiguous() for x in (q, k, v)), mask, rows)
    assert torch.equal(run(device, q, k, v, mask, rows)[0], plain[0])
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(run(device, *head_major, mask, rows)[0], plain[0])
    last = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(run(device, *last, mask, rows)[0], plain[0])
    inputs = [x.detach().clone().requires_grad_() for x in on(device, q, k, v)]
    mask, rows = on(device, mask, rows)
    out = block_sparse_attention(*inputs, mask, rows=rows, backend="triton")
    expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)  # gradient of stride 0
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for a, b in zip(expanded, dense):
        assert torch.equal(a, b)


def test_rows_are_bit_equal_to_a_materialised_reorder(device):
    q, k, v, mask, rows, _, _ = build(length=203, batch=2, lead=(2, 3), rows=(2, 3))
    moved = [permute(x.transpose(1, 2), rows).transpose(1, 2) for x in (q, k, v)]
    expected, expected_lse = run(device, *moved, mask)
    out, lse = run(device, q, k, v, mask, rows)
    assert torch.equal(permute(out.transpose(1, 2), rows).transpose(1, 2), expected)
    assert torch.equal(lse.gather(2, rows.long().expand_as(lse)), expected_lse)


def gradients(device, dtype, **case):
    q, k, v, mask, rows, hide, visible = build(**case, dtype=dtype)
    grad = torch.randn_like(q)
    results = {}
    for name, compute in (("exact", torch.float64), ("eager", dtype)):
        inputs = [x.detach().clone().to(compute).requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*inputs, visible, rows, dtype=compute)
        if name == "exact":
            seen = lse.isfinite()
            weight = torch.randn_like(q[..., 0].transpose(1, 2))
        loss = (out * grad.to(compute)).sum() + (lse * weight.to(compute))[seen].sum()
        results[name] = torch.autograd.grad(loss, inputs)
    inputs = [x.requires_grad_() for x in on(device, q, k, v)]
    grad, weight, seen, mask, rows, hide = on(device, grad, weight, seen, mask, rows, hide)

    def ours():
        out, lse = block_sparse_attention(*inputs, mask, rows=rows, key_mask=hide, return_lse=True, backend="triton")
        loss = (out.float() * grad.float()).sum() + (lse * weight.float())[seen].sum()
        return torch.autograd.grad(loss, inputs)

    return ours, results


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_float32(case, device):
    ours, results = gradients(device, torch.float32, **CASES[case])
    for name, actual, exact, eager in zip("qkv", ours(), results["exact"], results["eager"]):
        assert_close(actual.cpu(), exact, eager, torch.float32, f"d{name}")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
def test_gradients_half(dim, dtype, device):
    ours, results = gradients(device, dtype, dim=dim, length=150, heads=2, rows=(1, 2))
    for name, actual, exact, eager in zip("qkv", ours(), results["exact"], results["eager"]):
        assert actual.dtype == dtype
        assert_close(actual.cpu(), exact, eager, dtype, f"d{name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64), (32, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_compiled(block, dim, dtype, permuted, device):
    case = {"block": block, "dim": dim, "length": 700, "rows": (1, 3) if permuted else None}
    ours, results = gradients(device, dtype, **case)
    first, second = ours(), ours()
    for name, actual, again, exact, eager in zip("qkv", first, second, results["exact"], results["eager"]):
        assert torch.equal(actual, again), f"d{name} differs from run to run"
        assert_close(actual.cpu(), exact, eager, dtype, f"d{name}")


def test_unread_blocks_are_not_read(device):
    q, k, v, mask, *_ = build()
    keep = mask.to_dense()
    keep[:, :, :, 2] = False
    keep[:, :, :, 0] = True
    mask = BlockMask.from_dense(keep, 64, 64, 256, 256)
    expected, _ = run(device, q, k, v, mask)
    k[:, 128:192], v[:, 128:192] = float("nan"), float("nan")
    assert torch.equal(run(device, q, k, v, mask)[0], expected)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_propagates_to_the_rows_that_see_it(which, device):
    q, k, v, mask, _, _, visible = build()
    {"q": q, "k": k, "v": v}[which][0, 70, 1, 5] = float("nan")
    out, _ = run(device, q, k, v, mask)
    expected = torch.zeros(256, 3, dtype=torch.bool)
    if which == "q":
        expected[70, 1] = True
    else:
        expected[:, 1] = visible[0, 1, :, 70]
    assert expected.any()
    assert torch.equal(out[0].isnan().any(-1), expected)


def test_outputs_are_written_everywhere(device, monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        return real(*args, **kwargs).fill_(float("nan"))

    q, k, v, mask, rows, _, _ = build(length=203, rows=(1, 3), empty_rows=True)
    q, k, v, mask, rows = on(device, q, k, v, mask, rows)
    from dit_accel.kernels.attention.triton import backward as triton_backward
    from dit_accel.kernels.attention.triton import forward as triton_forward

    monkeypatch.setattr(triton_forward.torch, "empty", poisoned)
    out, lse = triton_forward.forward(q, k, v, mask, rows, None, 0.2)
    grads = triton_backward.backward(q, k, v, mask, rows, None, 0.2, out, lse, torch.ones_like(out), None)
    for x in (out, lse, *grads):
        assert not x.isnan().any()


@pytest.mark.parametrize("bits", [False, True])
def test_transposed_lists(bits):
    mask = random_mask((2, 3), 300, 203, 64, 32, bits=bits, empty_rows=True)
    turned = transpose_mask(mask)
    for b in range(2):
        for h in range(3):
            full, partial, rows = set(), set(), {}
            for i in range(5):
                for slot in range(int(mask.kv_num_blocks[b, h, i])):
                    j = int(mask.kv_indices[b, h, i, slot])
                    (full if slot < int(mask.kv_num_full[b, h, i]) else partial).add((j, i))
                    rows[j, i] = int(mask.kv_bits[b, h, i, slot]) if bits else None
            for j in range(7):
                count, num_full = int(turned.q_num_blocks[b, h, j]), int(turned.q_num_full[b, h, j])
                ids = turned.q_indices[b, h, j, :count].tolist()
                assert ids[:num_full] == sorted(i for jj, i in full if jj == j)
                assert ids[num_full:] == sorted(i for jj, i in partial if jj == j)
                if bits:
                    assert turned.q_bits[b, h, j, :count].tolist() == [rows[j, i] for i in ids]


def test_operator_is_well_formed(device):
    from dit_accel.kernels.attention import op as triton_attention

    q, k, v, mask, rows, _, _ = build(length=100, heads=2, rows=(1, 2), bits=True)
    q, k, v, mask, rows = on(device, q, k, v, mask, rows)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.kv_num_full, mask.kv_bits, mask.token_bits)
    torch.library.opcheck(
        triton_attention.block_sparse_fwd,
        (*inputs, *lists, rows, None, 64, 64, 0.2),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_without_a_graph_break(device):
    q, k, v, mask, rows, *_ = build(length=100, heads=2, rows=(1, 2))
    q, k, v, mask, rows = on(device, q, k, v, mask, rows)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return block_sparse_attention(q * 1.5, k, v, mask, rows=rows, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), call(*inputs))
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs).sum(), inputs), torch.autograd.grad(call(*inputs).sum(), inputs)
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_automatic_choice_on_a_gpu_is_triton(device):
    q, k, v, mask, *_ = build(dtype=torch.bfloat16)
    q, k, v, mask = on(device, q, k, v, mask)
    assert choose_backend(q, k, v, mask)[0] == "triton"


@pytest.mark.gpu
def test_offsets_beyond_two_gigabytes(device):
    # 12 of 20,000 heads are used: the strides alone pass 2**31 elements.
    length, dim = 1024, 128
    big = torch.empty(1, length, 20000, dim, dtype=torch.bfloat16, device=device)
    q, k, v = (big[:, :, i * 6 + 19000 : i * 6 + 19002].normal_() for i in range(3))
    mask = random_mask((1, 2), length, length, 128, 128, device=device)
    rows = random_rows((1, 2), length).to(device)
    far = block_sparse_attention(q, k, v, mask, rows=rows, backend="triton")
    near = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), mask, rows=rows, backend="triton")
    assert torch.equal(far, near)


def test_visible_tokens_agrees_with_the_contract():
    mask = random_mask((1, 2), 203, 203, 64, 64, bits=True)
    assert torch.equal(mask.to_tokens(), visible_tokens(mask))
