"""Selection against plain loops in float64: same blocks, same order, nothing hidden, nothing forgotten."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel.kernels.common.tokens import hidden_blocks
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.kernels.mask.packed import PackedBlockMask, pack_bits
from dit_accel.kernels.selection.api import (
    pool_blocks,
    pool_two,
    pooled_scores,
    select_blocks,
    select_pooled,
    self_similarity,
)

from .selection_oracle import assert_lists, loop_select

NAMED = ("torch", "triton")


def loop_pool(x, block, rows=None, key_mask=None):
    x = x.double().cpu().numpy()
    batch, seq, heads, dim = x.shape
    out = np.zeros((batch, heads, -(-seq // block), dim))
    for b in range(batch):
        for h in range(heads):
            for i in range(out.shape[2]):
                slots = range(i * block, min((i + 1) * block, seq))
                if rows is not None:
                    row = rows[min(b, rows.shape[0] - 1), min(h, rows.shape[1] - 1)]
                    slots = [int(row[n]) for n in slots]
                kept = [n for n in slots if key_mask is None or bool(key_mask[b, n])]
                if kept:
                    out[b, h, i] = np.mean([x[b, n, h] for n in kept], axis=0)
    return out


def permutations(batch, heads, seq, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, seq, generator=gen).argsort(-1).to(torch.int32)


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim", "block", "row_shape", "masked", "dtype"),
    [
        (1, 64, 1, 16, 16, None, False, torch.float32),
        (2, 77, 3, 24, 16, None, False, torch.float16),
        (2, 77, 3, 24, 16, (2, 3), False, torch.float32),
        (2, 65, 2, 72, 32, (1, 1), True, torch.float16),
        (2, 50, 2, 40, 64, (1, 2), True, torch.float32),
        (2, 90, 2, 64, 16, None, True, torch.float32),
    ],
)
def test_pool_blocks(backend, batch, seq, heads, dim, block, row_shape, masked, dtype, device):
    torch.manual_seed(1)
    # Strided on purpose: heads first in memory, and a slice of a wider tensor.
    x = torch.randn(batch, heads, seq, dim + 3, dtype=dtype, device=device).transpose(1, 2)[..., :dim]
    rows = None if row_shape is None else permutations(*row_shape, seq).to(device)
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, seq, device=device) > 0.4
        key_mask[0, :block] = False
        x[~key_mask] = torch.nan
    got = pool_blocks(x, block, rows=rows, key_mask=key_mask, backend=backend)
    assert got.dtype == torch.float32
    want = loop_pool(x, block, rows, key_mask)
    # A float32 sum of `block` terms and one division: (block + 1) roundings of the largest partial sum.
    bound = (block + 1) * 2.0**-24 * 4.0
    assert np.abs(got.double().cpu().numpy() - want).max() <= bound
    if masked and rows is None:
        assert (got[0, :, 0] == 0).all()
    # Two in one launch, of other strides, and rounded once.
    other = torch.randn(batch, seq, heads, dim, dtype=dtype, device=device)
    alone = pool_blocks(other, block, rows=rows, key_mask=key_mask, backend=backend)
    for of in (torch.float32, torch.float16):
        both = pool_two(x, other, block, rows=rows, key_mask=key_mask, dtype=of, backend=backend)
        assert torch.equal(both, torch.stack([got, alone]).to(of))


@pytest.mark.parametrize("backend", NAMED)
def test_pooled_scores(backend, device):
    torch.manual_seed(2)
    q = torch.randn(2, 70, 2, 32, device=device)
    k = torch.randn(2, 70, 2, 32, device=device)
    rows, key_mask = permutations(2, 2, 70).to(device), torch.rand(2, 70, device=device) > 0.3
    for scale in (None, 0.7):
        got = pooled_scores(q, k, 32, 16, rows=rows, key_mask=key_mask, scale=scale, backend=backend)
        want = loop_pool(q, 32, rows) @ loop_pool(k, 16, rows, key_mask).swapaxes(-1, -2)
        np.testing.assert_allclose(got.cpu(), want * (scale or 32**-0.5), atol=1e-5)


def test_hidden_blocks(device):
    mask = torch.ones(2, 70, dtype=torch.bool, device=device)
    mask[0, 16:32] = False
    mask[1, 40] = False
    empty, partial = hidden_blocks(mask, 16)
    assert empty[:, 0].tolist() == [[False, True, False, False, False], [False] * 5]
    assert partial[:, 0].tolist() == [[False] * 5, [False, False, True, False, False]]
    rows = torch.arange(69, -1, -1, device=device)[None, None]
    empty, partial = hidden_blocks(mask, 16, rows=rows)
    assert not empty.any()
    assert partial[0, 0].tolist() == [False, False, True, True, False]


def cases():
    def draw(*shape):
        return torch.rand(*shape) < 0.25

    gen = {"block_q": 32, "block_k": 32, "q_len": 32 * 5, "kv_len": 32 * 5}
    ragged = {"block_q": 64, "block_k": 16, "q_len": 201, "kv_len": 201}
    cross = {"block_q": 16, "block_k": 32, "q_len": 42, "kv_len": 333}
    torch.manual_seed(3)
    yield "topk", {**gen, "density": 0.3}
    yield "topk-one", {**gen, "density": 1e-6, "keep_own": False}
    yield "topk-all", {**ragged, "density": 1.0}
    yield "ragged", {**ragged, "density": 0.2}
    yield "ragged-no-own", {**ragged, "density": 0.2, "keep_own": False}
    yield "wider-keys", {**cross, "density": 0.15}
    yield "top-p", {**ragged, "top_p": 0.6}
    yield "top-p-all", {**ragged, "top_p": 1.0, "keep_own": False}
    yield "top-p-tiny", {**ragged, "top_p": 1e-4, "keep_own": False}
    yield "union", {**ragged, "density": 0.2, "top_p": 0.5}
    yield "forced", {**ragged, "density": 0.2, "forced_q": draw(4), "forced_k": draw(13)}
    yield "forced-batch", {**ragged, "density": 0.2, "forced_q": draw(2, 4), "forced_k": draw(2, 13)}
    yield "forced-all", {**ragged, "density": 0.2, "top_p": 0.3, "forced_k": torch.ones(13, dtype=torch.bool)}
    yield "partial", {**ragged, "density": 0.4, "partial_k": draw(2, 13), "empty_k": draw(2, 13)}
    yield (
        "everything",
        {
            **ragged,
            "density": 0.1,
            "top_p": 0.3,
            "forced_q": draw(1, 4),
            "forced_k": draw(2, 13),
            "partial_k": draw(2, 2, 13),
            "empty_k": draw(2, 2, 13),
        },
    )
    yield "all-empty", {**ragged, "density": 0.4, "empty_k": torch.ones(13, dtype=torch.bool)}
    yield "per-head", {**ragged, "density": torch.tensor([[0.1, 0.5], [0.02, 1.0]])}


CASES = dict(cases())


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("name", CASES)
def test_select_blocks(name, backend, device):
    args = CASES[name]
    torch.manual_seed(4)
    nq, nk = -(-args["q_len"] // args["block_q"]), -(-args["kv_len"] // args["block_k"])
    scores = torch.randn(2, 2, nq, nk)
    scores[0, 1] = (scores[0, 1] * 2).round()  # many ties
    scores[1, 1] = 0.0  # nothing but ties
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in args.items()}
    mask = select_blocks(scores.to(device), **moved, backend=backend)
    assert_lists(mask, loop_select(scores, **args))


@pytest.mark.parametrize("backend", NAMED)
def test_select_blocks_odd_scores(backend, device):
    """NaN ranks last, infinities and signed zeros keep their order, and nothing crashes."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor(
        [
            [nan] * 6,
            [1.0, nan, 3.0, nan, -1.0, 2.0],
            [inf, 0.0, inf, -inf, 1.0, nan],
            [-0.0, 0.0, -1e-42, 1e-42, -0.0, 0.0],
            [-inf] * 6,
            [-3e38, 3e38, -1.0, 1.0, -3.4e38, 3.4e38],
        ]
    )[None, None]
    args = {"block_q": 8, "block_k": 8, "q_len": 48, "kv_len": 48, "keep_own": False}
    for density in (0.34, 0.5, 0.9):
        mask = select_blocks(scores.to(device), density=density, **args, backend=backend)
        assert_lists(mask, loop_select(scores, density=density, **args))
    mask = select_blocks(scores.to(device), top_p=0.5, **args, backend=backend)
    assert mask.to_dense().any(-1).all()


@pytest.mark.parametrize("backend", NAMED)
def test_select_pooled(backend, device):
    """The convenience call equals its two halves, never lists hidden blocks, and lists padding as partial."""
    torch.manual_seed(5)
    q, k = torch.randn(2, 150, 2, 32, device=device), torch.randn(2, 150, 2, 32, device=device)
    key_mask = torch.ones(2, 150, dtype=torch.bool, device=device)
    key_mask[0, 70:] = False
    rows = permutations(1, 1, 150).to(device)
    for order in (None, rows):
        mask = select_pooled(q, k, block_q=32, block_k=16, density=0.3, rows=order, key_mask=key_mask, backend=backend)
        empty, partial = hidden_blocks(key_mask, 16, rows=order)
        scores = pooled_scores(q, k, 32, 16, rows=order, key_mask=key_mask, backend=backend)
        want = loop_select(
            scores.cpu(), block_q=32, block_k=16, q_len=150, kv_len=150, density=0.3,
            partial_k=partial.cpu(), empty_k=empty.cpu(),
        )  # fmt: skip
        assert_lists(mask, want)
        assert not (mask.to_dense() & empty[:, :, None]).any()


def test_errors():
    scores = torch.zeros(1, 1, 4, 4)
    geometry = {"block_q": 16, "block_k": 16, "q_len": 64, "kv_len": 64}
    for value in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="density must lie in"):
            select_blocks(scores, density=value, **geometry)
        with pytest.raises(ValueError, match="top_p must lie in"):
            select_blocks(scores, top_p=value, **geometry)
    with pytest.raises(ValueError, match="neither"):
        select_blocks(scores, **geometry)
    with pytest.raises(ValueError, match="scores must be"):
        select_blocks(scores[..., :3], density=0.5, **geometry)
    with pytest.raises(ValueError, match="forced_k must be"):
        select_blocks(scores, density=0.5, forced_k=torch.ones(3, dtype=torch.bool), **geometry)
    with pytest.raises(ValueError, match="backend must be one of auto, triton"):
        select_blocks(scores, density=0.5, backend="cuda", **geometry)


@pytest.mark.parametrize("nk", [7, 33, 130])
def test_lists_of_a_dense_map(nk, device):
    """The kernel that lists a boolean map, row by row in plain Python."""
    from dit_accel.kernels.mask.triton_lists import block_lists_triton

    rank = torch.randint(0, 3, (2, 3, 5, nk), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    rank[0, 0, 0], rank[0, 0, 1] = 2, 0  # nothing, and everything
    indices, number, number_full = (x.cpu() for x in block_lists_triton(rank.to(device)))
    for b, h, i in np.ndindex(2, 3, 5):
        full, partial = ([j for j in range(nk) if rank[b, h, i, j] == kind] for kind in (0, 1))
        assert indices[b, h, i, : number[b, h, i]].tolist() == full + partial
        assert int(number_full[b, h, i]) == len(full)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block_k", "kv_len"), [(16, 16 * 7), (16, 16 * 33 - 5), (32, 32 * 130 - 1)])
def test_a_packed_mask_has_the_lists_of_the_mask(masked, block_k, kv_len, device):
    nk, generator = -(-kv_len // block_k), torch.Generator().manual_seed(0)
    keep = torch.rand(2, 3, 5, nk, generator=generator) < 0.3
    keep[0, 0, 0], keep[0, 0, 1] = False, masked  # nothing, and everything
    partial = torch.rand(2, 3, 5, nk, generator=generator) < 0.2 if masked else None
    mask = BlockMask.from_dense(keep, 16, block_k, 75, kv_len, partial=partial)
    packed = PackedBlockMask.of(mask.to(device), key_mask=masked)
    assert packed.kept.numel() <= keep.numel() / 8 + keep[..., 0].numel()
    found = packed.lists().to("cpu")
    assert found.kv_indices.shape[-1] == int(keep.sum(-1).max())
    assert torch.equal(found.kv_num_blocks, mask.kv_num_blocks)
    assert torch.equal(found.kv_num_full, mask.kv_num_full)
    for b, h, i in np.ndindex(2, 3, 5):
        count = int(mask.kv_num_blocks[b, h, i])
        assert torch.equal(found.kv_indices[b, h, i, :count], mask.kv_indices[b, h, i, :count])


def test_small_lists_are_unpacked_once(device, monkeypatch):
    keep = torch.rand(1, 2, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = BlockMask.from_dense(keep, 16, 16, 48, 640).to(device)
    small = PackedBlockMask.of(mask, key_mask=False)
    assert small.lists() is small.lists()
    monkeypatch.setattr("dit_accel.kernels.mask.packed.SMALL_LISTS", small.lists().kv_indices.nbytes - 1)
    large = PackedBlockMask.of(mask, key_mask=False)
    first, second = large.lists(), large.lists()
    assert first is not second
    assert torch.equal(first.to_dense(), second.to_dense())
    assert torch.equal(first.to_dense().cpu(), keep)


@pytest.mark.gpu
def test_lists_that_a_cuda_graph_unpacks_are_its_own():
    """They hold nothing before its replay, so that no call outside it may read them."""
    keep = torch.rand(1, 2, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = BlockMask.from_dense(keep, 16, 16, 48, 640).to("cuda")
    PackedBlockMask.of(mask, key_mask=False).lists()  # compiles
    packed = PackedBlockMask.of(mask, key_mask=False)
    _ = packed._width  # waits for the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = packed.lists()
    outside = packed.lists()
    assert outside is not inside
    assert outside is packed.lists()
    assert torch.equal(outside.to_dense().cpu(), keep)
    graph.replay()
    assert torch.equal(inside.to_dense().cpu(), keep)


@pytest.mark.parametrize("nk", [7, 33, 130])
def test_lists_of_bits(nk, device):
    """The kernel that lists bits, row by row in plain Python."""
    from dit_accel.kernels.mask.triton_lists import block_lists_of_bits

    generator = torch.Generator().manual_seed(0)
    keep, partial = (torch.rand(2, 3, 5, nk, generator=generator) < share for share in (0.4, 0.3))
    keep[0, 0, 0], keep[0, 0, 1] = False, True  # nothing, and everything
    for part, short in ((None, -1), (None, nk - 1), (partial, nk - 1)):
        bits = pack_bits(keep).to(device), None if part is None else pack_bits(part).to(device)
        indices, number, number_full = (x.cpu() for x in block_lists_of_bits(*bits, nk, short, nk))
        masked = torch.zeros_like(keep) if part is None else part.clone()
        masked[..., short if short >= 0 else slice(0)] = True
        for b, h, i in np.ndindex(2, 3, 5):
            row, hidden = keep[b, h, i], masked[b, h, i]
            full, some = ((row & which).nonzero()[:, 0].tolist() for which in (~hidden, hidden))
            assert indices[b, h, i, : number[b, h, i]].tolist() == full + some
            assert int(number_full[b, h, i]) == len(full)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("nk", [7, 33, 130])
def test_bits_of_lists(nk, trimmed, device):
    """The kernel that packs lists, whose entries past a row's number hold anything."""
    from dit_accel.kernels.mask.triton_lists import bits_of_block_lists

    generator = torch.Generator().manual_seed(0)
    keep, partial = (torch.rand(2, 3, 5, nk, generator=generator) < share for share in (0.4, 0.3))
    keep[0, 0, 0], keep[0, 0, 1] = False, not trimmed  # nothing, and everything
    mask = BlockMask.from_dense(keep, 16, 16, 75, nk * 16, partial=partial)
    past = torch.arange(nk) >= mask.kv_num_blocks[..., None]
    mask = replace(mask, kv_indices=torch.where(past, 10**7, mask.kv_indices).to(torch.int32))
    mask = (mask.trimmed() if trimmed else mask).to(device)
    kept, some = (x.cpu() for x in bits_of_block_lists(mask, True))
    assert torch.equal(kept, pack_bits(keep))
    assert torch.equal(some, pack_bits(keep & partial))
    assert bits_of_block_lists(mask, False)[1] is None


def test_a_mask_with_token_bits_is_not_packed():
    keep = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    bits = torch.zeros(1, 32, 1, dtype=torch.int32)
    mask = BlockMask.from_dense(keep, 32, 32, 32, 64, bit_rows=torch.zeros(1, 1, 1, 2), token_bits=bits)
    with pytest.raises(ValueError, match="token bits cannot be packed"):
        PackedBlockMask.of(mask, key_mask=False)


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("centred", [False, True])
def test_self_similarity(backend, centred, device):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 75, 2, 24, generator=generator) + 1.0
    rows = torch.stack([torch.randperm(75, generator=generator) for _ in range(2)])[None].to(torch.int32)
    key_mask = torch.rand(2, 75, generator=generator) > 0.4
    x[1, ~key_mask[1]] = torch.nan  # a padded prompt may hold it
    centre = torch.randn(2, 2, 24, generator=generator) if centred else None
    found = self_similarity(
        x.to(device), 32, rows=rows.to(device), key_mask=key_mask.to(device),
        centre=None if centre is None else centre.to(device), backend=backend,
    )  # fmt: skip
    for b, h in np.ndindex(2, 2):
        for i in range(3):
            tokens = [int(n) for n in rows[0, h, i * 32 : (i + 1) * 32] if key_mask[b, n]]
            some = x[b, tokens, h].double() - (0.0 if centre is None else centre[b, h].double())
            unit = some / some.norm(dim=-1, keepdim=True)
            assert float(found[b, h, i]) == pytest.approx(float((unit @ unit.T).mean()), abs=1e-5)
