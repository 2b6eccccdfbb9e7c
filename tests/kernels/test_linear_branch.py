"""The linear branch against token-level linear attention in float64, with gradients."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.linear.api import add_linear_branch, linear_branch, linear_states, marginal_map
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.kernels.selection.api import select_blocks

from .test_selection import NAMED, permutations

PHI = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


def oracle(q, k, v, feature_map, marginal=None, blocks=None, rows=None, key_mask=None, eps=0.0):
    """Every token against every token, in float64, under the block map spread over tokens."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weight = PHI[feature_map](q) @ PHI[feature_map](k).transpose(-1, -2)
    batch, heads, q_len, kv_len = weight.shape
    if marginal is not None:
        tokens = marginal.double().repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)
        tokens = tokens[:, :, :q_len, :kv_len].expand(batch, heads, -1, -1)
        if rows is not None:
            slot_of = rows.long().expand(batch, heads, q_len).argsort(-1)
            tokens = tokens.gather(2, slot_of[..., None].expand_as(tokens))
            tokens = tokens.gather(3, slot_of[..., None, :].expand_as(tokens))
        weight = weight * tokens
    if key_mask is not None:
        weight = weight * key_mask[:, None, None]
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
    den = weight.sum(-1, keepdim=True) + eps
    return torch.where(den > 0, weight @ v / torch.where(den > 0, den, 1.0), 0.0).transpose(1, 2)


def draw(batch, seq, heads, dim, block_q, block_k, dtype, device, negligible, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(batch, heads, seq, dim, generator=gen).to(device, dtype).transpose(1, 2) for _ in range(4)
    )
    nq, nk = -(-seq // block_q), -(-seq // block_k)
    scores = torch.randn(batch, heads, nq, nk, generator=gen).to(device)
    geometry = {"block_q": block_q, "block_k": block_k, "q_len": seq, "kv_len": seq}
    critical = select_blocks(scores, density=0.25, backend="torch", **geometry)
    low = select_blocks(-scores, density=0.2, keep_own=False, backend="torch", **geometry)
    return q, k, v, grad, critical, low if negligible else None


def hide_keys(k, v):
    """A key mask; what it hides becomes NaN and infinite, since padded prompts may hold anything."""
    seen = torch.rand(k.shape[:2], device=k.device, generator=torch.Generator(k.device).manual_seed(1)) > 0.3
    k[~seen] = torch.nan
    v[~seen] = torch.inf
    return seen


def rounding(dtype):
    """Unit roundoff; float32 sums of a few hundred terms."""
    half = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    return {torch.float32: 2.0**-24 * 64, torch.float64: 2.0**-53 * 64, **half}[dtype]


CASES = [
    # batch, seq, heads, dim, bq, bk, map, negligible, permuted, masked, eps, dtype
    (1, 128, 1, 64, 64, 32, "softmax", False, False, False, 0.0, torch.float32),
    (2, 150, 2, 64, 32, 16, "softmax", True, False, False, 0.0, torch.float32),
    (1, 150, 2, 96, 64, 64, "elu", True, True, False, 0.0, torch.float16),
    (1, 140, 2, 128, 128, 64, "softmax", False, True, True, 0.0, torch.float16),
    (2, 77, 2, 40, 32, 32, "relu", True, True, True, 1e-2, torch.float32),
    (1, 200, 1, 64, 64, 32, "softmax", True, False, False, 0.0, torch.float16),
]


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"S{c[1]}-D{c[3]}-{c[6]}-{str(c[-1])[6:]}")
@pytest.mark.parametrize("everything", [False, True], ids=["marginal", "all-tokens"])
def test_linear_branch(backend, case, everything, device):
    batch, seq, heads, dim, block_q, block_k, kind, low, permuted, masked, eps, dtype = case
    q, k, v, grad, critical, negligible = draw(
        batch, seq, heads, dim, block_q, block_k, dtype, device, low and not everything
    )
    rows = permutations(1, heads, seq).to(device) if permuted else None
    key_mask = hide_keys(k, v) if masked else None
    if everything:
        marginal, critical = None, None
    else:
        marginal = marginal_map(critical, negligible)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = linear_branch(
        *leaves, critical, negligible=negligible, feature_map=kind, rows=rows, key_mask=key_mask, eps=eps,
        backend=backend,
    )  # fmt: skip
    out.backward(grad)
    clean = [q, k, v]
    if masked:
        clean = [
            q,
            k.masked_fill(~key_mask[..., None, None], 0),
            v.masked_fill(~key_mask[..., None, None], 0),
        ]
    exact = [x.detach().double().requires_grad_() for x in clean]
    want = oracle(*exact, kind, marginal, (block_q, block_k), rows, key_mask, eps)
    want.backward(grad.double())
    assert out.dtype == dtype
    # Each of phi, state, sum and output is rounded once (an eager kernel rounds as often), relative to the
    # largest value of the result.
    unit = rounding(dtype)
    assert (out - want).abs().max() <= 8 * unit * want.abs().max()
    for name, leaf, ref in zip("qkv", leaves, exact):
        error = (leaf.grad - ref.grad).abs().max() / ref.grad.abs().max()
        assert error <= 16 * unit, f"d{name}: {error:.2e}"


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("per_head", [False, True])
def test_add_linear_branch(backend, per_head, device):
    """The fused epilogue adds the projected branch to what is there."""
    q, k, v, start, critical, negligible = draw(2, 90, 2, 64, 32, 32, torch.float32, device, True)
    shape = (2,) if per_head else ()
    weight, bias = torch.randn(*shape, 64, 64, device=device) / 8, torch.randn(*shape, 64, device=device)
    for mask, eps in ((critical, 0.0), (None, 1e-5)):
        low = negligible if mask is not None else None
        out = start.clone()
        got = add_linear_branch(out, q, k, v, mask, weight, bias, negligible=low, eps=eps, backend=backend)
        assert got is out
        marginal = None if mask is None else marginal_map(mask, low)
        branch = oracle(q, k, v, "softmax", marginal, (32, 32), eps=eps)
        weights = weight.double().expand(2, 64, 64)
        want = start.double() + torch.einsum("bshd,hed->bshe", branch, weights) + bias.double()
        assert (got - want).abs().max() <= 32 * rounding(torch.float32) * want.abs().max()


@pytest.mark.parametrize("backend", NAMED)
def test_no_marginal_blocks(backend, device):
    """A row whose blocks are all critical has an empty sum: exactly 0, and gradients without NaN."""
    q, k, v, grad, _, _ = draw(1, 64, 1, 32, 16, 16, torch.float32, device, False)
    scores = torch.zeros(1, 1, 4, 4, device=device)
    every = select_blocks(scores, density=1.0, block_q=16, block_k=16, q_len=64, kv_len=64, backend="torch")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = linear_branch(*leaves, every, backend=backend)
    out.backward(grad)
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in leaves)


def test_double_gradcheck():
    """The torch version is differentiable in float64 by autograd alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 24, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    critical = BlockMask.from_dense(torch.rand(1, 1, 3, 3) > 0.6, 8, 8, 24, 24)
    assert torch.autograd.gradcheck(lambda *x: linear_branch(*x, critical, backend="torch"), (q, k, v))


def test_linear_states_and_errors(device):
    q, k, v, _, critical, negligible = draw(1, 50, 2, 16, 16, 16, torch.float32, device, True)
    h, z = linear_states(k, v, 16)
    phi = k.double().transpose(1, 2).softmax(-1)
    last = phi[:, :, 48:].transpose(-1, -2) @ v.double().transpose(1, 2)[:, :, 48:]
    torch.testing.assert_close(h[:, :, 3].double(), last, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(z.sum(2).double(), phi.sum(2), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        linear_branch(q, k, v, critical, feature_map="cosine")
    with pytest.raises(ValueError, match="must agree"):
        linear_branch(q, k, v[:, :-1], critical)
    with pytest.raises(ValueError, match="negligible needs critical"):
        linear_branch(q, k, v, None, negligible=negligible)
    wide = torch.randn(1, 32, 1, 160, device=device)
    with pytest.raises(ValueError, match="at most 128"):
        linear_branch(wide, wide, wide, None, backend="triton")
    assert linear_branch(wide, wide, wide, None).shape == wide.shape
    with pytest.raises(ValueError, match="is a mask of 50 x 50"):
        linear_branch(q[:, :-1], k, v, critical)


@pytest.mark.parametrize("small", [0, 1 << 13, 3 << 15, 1 << 30], ids=["a head", "a few", "a batch", "all"])
def test_launches_cover_every_head_once_and_change_nothing(small, device, monkeypatch):
    """However few heads share a launch, in whatever batches: the numbers of the torch path, forward and backward."""
    from dit_accel.kernels.linear.triton import backward as triton_linear_backward
    from dit_accel.kernels.linear.triton import forward as triton_linear

    q, k, v, grad, critical, low = draw(3, 96, 5, 16, 32, 32, torch.float32, device, True)
    launched = []
    chunks = triton_linear.Shape.chunks

    def counted(shape, share, buffers):
        found = list(chunks(shape, share, buffers))
        launched.append(found)
        return iter(found)

    monkeypatch.setattr(triton_linear.Shape, "chunks", counted)
    monkeypatch.setattr(triton_linear, "STATE_BYTES", small)
    monkeypatch.setattr(triton_linear, "STATE_SHARE", 0.0)
    monkeypatch.setattr(triton_linear_backward, "STATE_SHARE", 0.0)
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = linear_branch(*leaves, critical, negligible=low, backend=backend)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-14, atol=2**-14 * float(theirs.abs().max()))
    assert len(launched) == 2
    for found in launched:
        seen = sorted((b, h) for batches, heads in found for b in range(3)[batches] for h in range(5)[heads])
        assert seen == [(b, h) for b in range(3) for h in range(5)]
    if small == 0:
        assert len(launched[0]) == 15
    if small == 1 << 30:
        assert len(launched[0]) == 1
