"""Pyramid attention against its definition, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.kernels.pyramid.api import pyramid_attention
from dit_accel.kernels.pyramid.levels import LEVELS, energy_levels, similarity_cap

from .selection_oracle import at
from .test_selection import NAMED, permutations


def oracle(q, k, v, levels, block_q, block_k, rows=None, key_mask=None):
    """One query block at a time: collect what it reads, run by run, and take a plain softmax."""
    batch, seq, heads, dim = q.shape
    out = torch.zeros(batch, seq, heads, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, seq), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            order = list(range(seq))
            if rows is not None:
                order = rows[min(b, rows.shape[0] - 1), min(h, rows.shape[1] - 1)].tolist()
            level_map = levels[min(b, levels.shape[0] - 1), min(h, levels.shape[1] - 1)]
            for i in range(level_map.shape[0]):
                keys, values, bias = [], [], []
                for j in range(level_map.shape[1]):
                    level = int(level_map[i, j])
                    if level == 0:
                        continue
                    for start in range(j * block_k, min((j + 1) * block_k, seq), level):
                        run = order[start : min(start + level, seq)]
                        run = [n for n in run if key_mask is None or key_mask[b, n]]
                        if run:
                            keys.append(k[b, run, h].double().mean(0))
                            values.append(v[b, run, h].double().mean(0))
                            bias.append(math.log(len(run)))
                mine = order[i * block_q : (i + 1) * block_q]
                if keys:
                    logits = q[b, mine, h].double() @ torch.stack(keys).T * dim**-0.5
                    logits = logits + torch.tensor(bias, dtype=torch.float64)
                    out[b, mine, h] = logits.softmax(-1) @ torch.stack(values)
                    lse[b, h, mine] = logits.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim", "block_q", "block_k", "lead", "permuted", "masked", "dtype"),
    [
        (1, 128, 1, 32, 64, 32, (1, 1), False, False, torch.float32),
        (2, 150, 2, 40, 32, 16, (2, 2), False, False, torch.float32),
        (1, 203, 2, 64, 64, 64, (1, 2), True, False, torch.float32),
        (2, 101, 2, 16, 32, 32, (1, 2), True, True, torch.float32),
        (1, 150, 2, 64, 64, 32, (1, 1), False, True, torch.float16),
    ],
)
def test_pyramid_attention(backend, batch, seq, heads, dim, block_q, block_k, lead, permuted, masked, dtype, device):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, seq, dim, generator=gen).to(dtype).transpose(1, 2) for _ in range(3))
    nq, nk = -(-seq // block_q), -(-seq // block_k)
    levels = torch.tensor((0, *LEVELS))[torch.randint(0, 5, (*lead, nq, nk), generator=gen)].to(torch.int8)
    levels[..., 0, :] = 0  # a row that reads nothing
    rows = permutations(1, heads, seq) if permuted else None
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, seq, generator=gen) > 0.3
        k[~key_mask], v[~key_mask] = torch.nan, torch.inf
    want, want_lse = oracle(q, k, v, levels, block_q, block_k, rows, key_mask)
    moved = [x.to(device) if x is not None else None for x in (q, k, v, levels, rows, key_mask)]
    out, lse = pyramid_attention(
        *moved[:4], block_q=block_q, block_k=block_k, rows=moved[4], key_mask=moved[5], return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert out.dtype == dtype
    # Pooled rows, probabilities and the output are rounded once each to the input's precision.
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-24 * 16
    assert (out.cpu() - want).abs().max() <= 8 * unit * want.abs().max()
    assert torch.equal(lse.cpu() == -torch.inf, want_lse == -torch.inf)
    assert (lse.cpu() - want_lse).nan_to_num(0.0).abs().max() <= 8 * unit * want_lse.nan_to_num(
        0.0, 0.0, 0.0
    ).abs().max()


def test_level_one_is_exact_and_gradients_flow():
    """All blocks at level 1 are plain attention; the torch version is differentiable in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ones = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    out = pyramid_attention(q, k, v, ones, block_q=8, block_k=8, backend="torch")
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, want.transpose(1, 2))
    levels = torch.tensor([[1, 2, 4], [8, 1, 0], [2, 8, 1]])[None, None]
    assert torch.autograd.gradcheck(
        lambda *x: pyramid_attention(*x, levels, block_q=8, block_k=8, backend="torch"), (q, k, v)
    )


@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim", "block_q", "block_k", "lead", "permuted", "masked", "dtype"),
    [
        (1, 110, 2, 40, 32, 16, (1, 2), False, False, torch.float32),
        (1, 203, 2, 64, 128, 64, (1, 2), True, False, torch.float32),
        (2, 71, 2, 16, 32, 32, (1, 2), True, True, torch.float32),
        (1, 150, 2, 64, 64, 128, (1, 1), False, True, torch.float16),
    ],
)
def test_triton_gradients(batch, seq, heads, dim, block_q, block_k, lead, permuted, masked, dtype, device):
    """Against autograd of the torch version in float64, which gradcheck holds to its forward."""
    gen = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(batch, seq, heads, dim, generator=gen).to(dtype) for _ in range(4))
    nq, nk = -(-seq // block_q), -(-seq // block_k)
    levels = torch.tensor((0, *LEVELS))[torch.randint(0, 5, (*lead, nq, nk), generator=gen)].to(torch.int8)
    levels[..., 0, :] = 0  # a row that reads nothing
    rows = permutations(1, heads, seq) if permuted else None
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, seq, generator=gen) > 0.3
        k[~key_mask], v[~key_mask] = torch.nan, torch.inf
    grad_lse = torch.randn(batch, heads, seq, generator=gen)

    def gradients(backend, place, kind):
        leaves = [x.to(place, kind).requires_grad_() for x in (q, k, v)]
        rest = [x.to(place) if x is not None else None for x in (levels, rows, key_mask, grad, grad_lse)]
        out, lse = pyramid_attention(
            *leaves, rest[0], block_q=block_q, block_k=block_k, rows=rest[1], key_mask=rest[2], return_lse=True,
            backend=backend,
        )  # fmt: skip
        seen = lse.isfinite()
        loss = (out.to(torch.float64) * rest[3]).sum() + (lse.to(torch.float64) * rest[4])[seen].sum()
        return torch.autograd.grad(loss, leaves)

    wanted = gradients("torch", "cpu", torch.float64)
    eager = gradients("torch", "cpu", torch.float32)
    first, second = gradients("triton", device, dtype), gradients("triton", device, dtype)
    # Pooled rows, probabilities, their gradients, and the result are rounded to the input's precision.
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-24 * 16
    for actual, again, want, usual in zip(first, second, wanted, eager):
        assert actual.dtype == dtype
        assert torch.equal(actual, again)
        assert actual.isfinite().all()
        limit = 8 * unit * want.abs().max() + 2 * (usual - want).abs().max()
        assert (actual.cpu() - want).abs().max() <= limit


@pytest.fixture
def small_tiles(monkeypatch):
    """As on a GPU with little shared memory: tiles of 16 rows, and all keys of a block where one program has them."""
    from dit_accel.kernels.pyramid.triton import backward, forward

    def smallest(x, kept, walked, kinds, *, least_kept=16):
        return max(least_kept, 16), min(walked, 16)

    for module in (forward, backward):
        monkeypatch.setattr(module, "fitting_tiles", smallest)


def test_small_tiles_give_the_same(small_tiles, device):
    test_pyramid_attention("triton", 2, 101, 2, 16, 32, 32, (1, 2), True, True, torch.float32, device)
    test_triton_gradients(1, 203, 2, 64, 128, 64, (1, 2), True, False, torch.float32, device)


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_tiles_fit_the_devices_shared_memory(dim, dtype, kinds, kib, monkeypatch):
    from dit_accel.kernels.pyramid.triton import forward

    class Rows:
        is_cuda = True
        device = torch.device("cuda", 0)
        shape = (1, 1, 1, dim)

        def element_size(self):
            return dtype.itemsize

    monkeypatch.setattr(forward, "shared_memory", lambda index: kib << 10)
    kept, walked = forward.fitting_tiles(Rows(), 128, 64, kinds)
    row = (128 if dim == 96 else dim) * dtype.itemsize
    assert kinds * kept * row + 2 * walked * row + kept * walked * dtype.itemsize < kib << 10
    assert 128 % kept == 64 % walked == 0
    assert min(kept, walked) >= 16
    # Nothing is halved without need.
    assert (kept, walked) == (128, 64) or (kinds * 128 + 128) * row + 128 * 64 * dtype.itemsize + 2048 > kib << 10


def test_level_assignment():
    gen = torch.Generator().manual_seed(0)
    importance = torch.rand(2, 2, 3, 40, generator=gen)
    importance[0, 0, 0] = 1.0  # ties: lower index first
    energy = energy_levels(importance, (0.3, 0.5, 0.6, 0.8))
    for b, h, i in ((b, h, i) for b in range(2) for h in range(2) for i in range(3)):
        row = importance[b, h, i].tolist()
        ranked = sorted(range(40), key=lambda j: (-row[j], j))
        total, before = sum(row), 0.0
        for rank, j in enumerate(ranked):
            bounds = zip(LEVELS, (0.3, 0.5, 0.6, 0.8))
            want = next((level for level, share in bounds if before / total < share), 0)
            want = 1 if rank < 3 else want
            assert int(energy[b, h, i, j]) == want
            before += row[j]
    with pytest.raises(ValueError, match="non-decreasing"):
        energy_levels(importance, (0.5, 0.1, 0.15, 0.25))


@pytest.mark.parametrize("backend", NAMED)
def test_similarity_cap(backend, device):
    k = torch.randn(1, 44, 1, 16, generator=torch.Generator().manual_seed(0))
    k[0, 16:32, 0] = torch.randn(16, generator=torch.Generator().manual_seed(1))
    k[0, 32:, 0] = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).repeat_interleave(2, 0)
    cap = similarity_cap(k.to(device), 16, backend=backend)
    assert cap[0, 0].tolist() == [1, 8, 2]
    assert at(cap[0, 0] > 1, 0, 0, 1)


@pytest.mark.parametrize("backend", NAMED)
def test_similarity_cap_of_permuted_heads_by_its_words(backend, device):
    generator = torch.Generator().manual_seed(3)
    seq, block, thresholds = 150, 32, (0.66, 0.62, 0.6)
    k = torch.randn(2, seq, 3, 24, generator=generator)
    k = k + torch.randn(2, 1, 3, 24, generator=generator) * torch.rand(2, seq // 10, 3, 1, generator=generator).mul(
        3
    ).repeat_interleave(10, 1)
    rows = permutations(1, 3, seq)
    found = similarity_cap(k.to(device), block, rows=rows.to(device), thresholds=thresholds, backend=backend)
    seen = set()
    for b in range(2):
        for h in range(3):
            order = rows[0, h].tolist()
            for i in range(-(-seq // block)):
                want = 1
                for level, threshold in zip((2, 4, 8), thresholds, strict=True):
                    runs = range(i * block, min((i + 1) * block, seq), level)
                    ends = [(order[n], order[n + level - 1]) for n in runs if n + level <= seq]
                    cosines = [
                        float(torch.cosine_similarity(k[b, first, h].double(), k[b, last, h].double(), dim=0))
                        for first, last in ends
                    ]
                    mean = sum(cosines) / max(len(cosines), 1)
                    assert abs(mean - threshold) > 1e-5, "too close to the threshold to tell"
                    if mean <= threshold:
                        break
                    want = level
                assert int(found[b, h, i]) == want
                seen.add(want)
    assert len(seen) > 2


def test_errors(device):
    q = torch.randn(1, 32, 1, 16, device=device)
    levels = torch.ones(1, 1, 2, 2, device=device)
    with pytest.raises(ValueError, match="multiple of 8"):
        pyramid_attention(q, q, q, levels, block_q=16, block_k=20)
    with pytest.raises(ValueError, match="levels must be"):
        pyramid_attention(q, q, q, levels, block_q=16, block_k=32)
