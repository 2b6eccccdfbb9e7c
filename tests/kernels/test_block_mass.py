"""Exact block mass against a dense float64 softmax."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.selection.block_mass import block_mass, sampled_slots, strided_block_mass

from .operations import CountedOperations
from .test_selection import NAMED, permutations


def oracle(q, k, block_q, block_k, rows=None, key_mask=None, scale=None):
    """Dense float64 softmax, permuted, then summed block by block."""
    q, k = q.double().cpu().transpose(1, 2), k.double().cpu().transpose(1, 2)
    logits = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask.cpu()[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    prob = (logits - lse[..., None]).exp().nan_to_num(0.0)
    if rows is not None:
        index = rows.cpu().long().expand(*prob.shape[:2], -1)
        prob = prob.gather(2, index[..., None].expand_as(prob))
        prob = prob.gather(3, index[..., None, :].expand_as(prob))
    rows_of = torch.split(prob, block_q, dim=2)
    mass = torch.stack([torch.stack([t.sum((2, 3)) for t in torch.split(r, block_k, dim=3)], -1) for r in rows_of], 2)
    return mass, lse


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim", "block_q", "block_k", "permuted", "masked", "dtype"),
    [
        (1, 128, 1, 64, 64, 32, False, False, torch.float32),
        (2, 77, 2, 40, 32, 16, True, False, torch.float32),
        (2, 70, 2, 64, 16, 32, True, True, torch.float16),
        (1, 300, 1, 16, 256, 64, False, True, torch.float16),
        (1, 200, 2, 16, 32, 32, False, "end", torch.float32),
        (1, 96, 2, 8, 32, 32, False, False, torch.float32),  # fewer dims than a matrix instruction has
        # More key blocks than the head has dims; of some runs of a head dim of them no key is visible.
        (1, 600, 2, 16, 64, 16, True, False, torch.float32),
        (2, 600, 2, 16, 64, 16, True, True, torch.float16),
        (2, 600, 1, 16, 32, 16, False, "end", torch.float32),
    ],
)
def test_block_mass(backend, batch, seq, heads, dim, block_q, block_k, permuted, masked, dtype, device):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, seq, heads, dim, dtype=dtype, device=device) * 2 for _ in range(2))
    rows = permutations(1, heads, seq).to(device) if permuted else None
    key_mask = torch.rand(batch, seq, device=device) > 0.3 if masked else None
    if masked == "end":  # a padded prompt behind the latents
        key_mask = torch.arange(seq, device=device).expand(batch, seq) < 150
    if masked and batch > 1:
        key_mask[1] = False  # nothing visible: no mass, lse -inf
    want, want_lse = oracle(q, k, block_q, block_k, rows, key_mask)
    mass, lse = block_mass(q, k, block_q=block_q, block_k=block_k, rows=rows, key_mask=key_mask, backend=backend)
    # float32 logits of `dim` terms up to |s| < 64 carry 64 * 2**-24 * sqrt(dim) or so each.
    tol = 64 * 2.0**-24 * dim**0.5 * 4
    assert (lse.cpu() - want_lse).nan_to_num(0.0).abs().max() <= tol
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    assert (mass.cpu() - want).abs().max() <= tol * block_q
    # One pass with the cached normaliser gives the same masses.
    again, same = block_mass(
        q, k, block_q=block_q, block_k=block_k, lse=lse, rows=rows, key_mask=key_mask, backend=backend
    )
    assert torch.equal(same, lse)
    assert (again - mass).abs().max() <= tol * block_q
    stale, _ = block_mass(
        q, k, block_q=block_q, block_k=block_k, lse=lse + 0.5, rows=rows, key_mask=key_mask, backend=backend
    )
    torch.testing.assert_close(stale, mass * torch.e**-0.5, atol=tol * block_q, rtol=1e-5)


def sample_of(number, block, stride):
    """Places in a block of ``number`` tokens: of every ``stride`` one, moved by the digits of its number."""
    places = []
    for first in range(0, number, stride):
        digits, rest, left = 0, first // stride, block // stride
        while left > 1:
            digits, rest, left = digits + rest % stride, rest // stride, left // stride
        places.append(min(first + digits % stride, number - 1))
    return places


def test_a_sample_leaves_no_row_of_a_tile_out():
    """Tiles of 4 x 4 x 4: with every fourth token the first ones alone would be of one column."""
    for stride in (2, 4, 8):
        places = torch.tensor(sample_of(64, 64, stride))
        assert torch.equal(sampled_slots(64, 64, stride, places.device), places)
        for axis in (places // 16, places // 4 % 4, places % 4):
            assert torch.bincount(axis, minlength=4).tolist() == [64 // stride // 4] * 4, stride
    assert sampled_slots(70, 64, 2, places.device)[-3:].tolist() == [64, 67, 69]
    assert torch.equal(sampled_slots(9, 8, 1, places.device), torch.arange(9))


def oracle_of_a_sample(q, k, block_q, block_k, stride, rows=None, key_mask=None):
    """Float64 softmax of every ``stride``-th query of a block alone; its mass counts for all tokens of its block."""
    batch, seq, heads, _ = q.shape
    order = torch.arange(seq) if rows is None else rows.cpu()
    order = order.expand(batch, heads, seq).tolist()
    q, k = q.double().cpu(), k.double().cpu()
    shown = torch.ones(batch, seq, dtype=torch.bool) if key_mask is None else key_mask.cpu()
    mass = torch.zeros(batch, heads, -(-seq // block_q), -(-seq // block_k), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(mass.shape[2]):
                tokens = order[b][h][i * block_q : (i + 1) * block_q]
                sample = [tokens[place] for place in sample_of(len(tokens), block_q, stride)]
                logits = q[b, sample, h] @ k[b, :, h].T * q.shape[-1] ** -0.5
                shares = logits.masked_fill(~shown[b], -torch.inf).softmax(-1).nan_to_num(0.0).sum(0)
                for j in range(mass.shape[3]):
                    keys = order[b][h][j * block_k : (j + 1) * block_k]
                    mass[b, h, i, j] = shares[keys].sum() * len(tokens) / len(sample)
    return mass


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize(
    ("batch", "seq", "dim", "block_q", "block_k", "stride", "orders", "masked", "dtype"),
    [
        (1, 128, 64, 64, 32, 4, None, False, torch.float32),
        (2, 77, 40, 32, 16, 2, (1, 2), False, torch.float32),
        (2, 131, 16, 64, 32, 4, (2, 1), True, torch.float16),
        (2, 130, 16, 64, 16, 4, (1, 2), True, torch.float32),
        (1, 301, 16, 128, 64, 8, None, True, torch.float16),
        (1, 200, 16, 128, 32, 2, (1, 1), "end", torch.float32),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_of_the_queries(
    backend, batch, seq, dim, block_q, block_k, stride, orders, masked, dtype, cached, device
):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, seq, 2, dim, dtype=dtype, device=device) * 2 for _ in range(2))
    rows = None if orders is None else permutations(*orders, seq).to(device)
    key_mask = torch.rand(batch, seq, device=device) > 0.3 if masked else None
    if masked == "end":
        key_mask = torch.arange(seq, device=device).expand(batch, seq) < 150
    if masked and batch > 1:
        key_mask[1] = False
    given = {"rows": rows, "key_mask": key_mask, "backend": backend}
    lse = block_mass(q, k, block_q=block_q, block_k=block_k, **given)[1] if cached else None
    mass = strided_block_mass(q, k, block_q=block_q, block_k=block_k, query_stride=stride, lse=lse, **given)
    want = oracle_of_a_sample(q, k, block_q, block_k, stride, rows, key_mask)
    assert (mass.cpu() - want).abs().max() <= 64 * 2.0**-24 * dim**0.5 * 4 * block_q
    whole, _ = oracle(q, k, block_q, block_k, rows, key_mask)
    assert (want - whole).abs().max() > 0.01, "the sample must be told from the whole"
    every = strided_block_mass(q, k, block_q=block_q, block_k=block_k, query_stride=1, lse=lse, **given)
    assert (every.cpu() - whole).abs().max() <= 64 * 2.0**-24 * dim**0.5 * 4 * block_q


@pytest.mark.parametrize("stride", [0, 3, 64])
def test_a_stride_that_does_not_divide_a_block_is_refused(stride):
    q = torch.randn(1, 64, 1, 16)
    with pytest.raises(ValueError, match=f"query_stride must divide a query block of 32 tokens, got {stride}"):
        strided_block_mass(q, q, block_q=32, block_k=32, query_stride=stride)


def test_block_mass_float64_and_chunks(monkeypatch):
    """The torch version keeps float64 inside, and its chunks do not show."""
    torch.manual_seed(1)
    q, k = (torch.randn(1, 90, 2, 24, dtype=torch.float64) for _ in range(2))
    want, _ = oracle(q, k, 16, 32, scale=0.3)
    whole, _ = block_mass(q, k, block_q=16, block_k=32, scale=0.3, backend="torch")
    monkeypatch.setattr("dit_accel.kernels.selection.block_mass.CHUNK_VALUES", 90 * 2 * 16)
    parts, _ = block_mass(q, k, block_q=16, block_k=32, scale=0.3, backend="torch")
    assert torch.equal(parts, whole)
    assert (whole - want).abs().max() <= 16 * 2.0**-23


@pytest.mark.parametrize("dim", [8, 64])
def test_fewer_queries_than_keys(dim):
    torch.manual_seed(2)
    q, k = torch.randn(1, 50, 2, dim), torch.randn(1, 300, 2, dim)
    logits = (q.transpose(1, 2).double() @ k.transpose(1, 2).double().mT) * dim**-0.5
    prob = torch.nn.functional.pad(logits.softmax(-1), (0, 4, 0, 14))
    mass, lse = block_mass(q, k, block_q=32, block_k=16, backend="torch")
    assert (mass - prob.unflatten(3, (19, 16)).sum(-1).unflatten(2, (2, 32)).sum(3)).abs().max() <= 32 * 2.0**-20
    assert (lse - logits.logsumexp(-1)).abs().max() <= 2.0**-20


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -3e38])
def test_what_hidden_keys_hold_does_not_matter(odd, device):
    """-3e38 is finite, and its logits are not."""
    torch.manual_seed(4)
    q, k = (torch.randn(2, 60, 2, 16, device=device) for _ in range(2))
    key_mask = torch.rand(2, 60, device=device) > 0.3
    odd_k = torch.where(key_mask[..., None, None], k, odd)
    for backend in ("torch", "triton"):
        want, other = (
            block_mass(q, one, block_q=32, block_k=32, key_mask=key_mask, backend=backend) for one in (k, odd_k)
        )
        assert torch.equal(other[0], want[0])
        assert torch.equal(other[1], want[1])


def test_any_strides_and_inputs_of_a_graph():
    torch.manual_seed(3)
    q, k = (torch.randn(1, 16, 90, 2).permute(0, 2, 3, 1) for _ in range(2))
    want, want_lse = block_mass(q.contiguous(), k.contiguous(), block_q=16, block_k=16, backend="torch")
    mass, lse = block_mass(q.requires_grad_(), k, block_q=16, block_k=16, backend="torch")
    assert torch.equal(mass, want)
    assert torch.equal(lse, want_lse)
    assert not mass.requires_grad


def test_a_longer_sequence_takes_no_more_operations():
    """Each is a parallel region, which costs a busy machine more than its work."""
    counts = []
    for seq in (128, 1024):
        q = torch.randn(1, seq, 2, 32)
        with CountedOperations() as counted:
            block_mass(q, q, block_q=32, block_k=32, backend="torch")
        counts.append(counted.number)
    assert counts[0] == counts[1] < 100


def test_errors(device):
    q = torch.randn(1, 32, 2, 16, device=device)
    with pytest.raises(ValueError, match="must agree"):
        block_mass(q, q[..., :8], block_q=16, block_k=16)
    with pytest.raises(ValueError, match="power of two"):
        block_mass(q, q, block_q=24, block_k=16, backend="triton")
