"""Attention that goes on over the means of what it left out: against one softmax over both, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from dit_accel.kernels.common.choice import Case
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.kernels.mask.packed import PackedBlockMask, kept_bits, pack_bits
from dit_accel.kernels.pyramid.means import BlockMeans, add_left_out_means, choose_means
from dit_accel.kernels.selection.api import pool_blocks

BATCH, HEADS, DIM = 2, 3, 16
SCALE = 0.7


@dataclass(frozen=True)
class _Case:
    """Queries, keys and a plan.

    Attributes:
        q, k, v: ``[B, S, H, D]``, k and v in float64.
        kept: bool ``[B, H|1, nq, nk]``.
        rows: int32 ``[B|1, H|1, S]`` or None.
        visible: bool ``[B, S]`` in the model's order.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kept: torch.Tensor
    rows: torch.Tensor | None
    visible: torch.Tensor
    block: tuple[int, int]
    tokens: int


def _case(
    block: tuple[int, int],
    length: int,
    *,
    tokens: int = 0,
    permuted: str = "",
    hidden: bool = False,
    heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
) -> _Case:
    """Of query blocks the first leaves out everything, the second nothing."""
    generator = torch.Generator().manual_seed(length + block[0])
    q, k, v = (torch.randn(BATCH, length, HEADS, DIM, generator=generator).to(dtype) for _ in range(3))
    nq, nk = (-(-length // size) for size in block)
    kept = torch.rand(BATCH, heads, nq, nk, generator=generator) < 0.4
    kept[:, :, 0] = False
    if nq > 1:
        kept[:, :, 1] = True
    rows = None
    if permuted:
        lead = (1, 1) if permuted == "alike" else (BATCH, HEADS)
        rows = torch.rand(*lead, length, generator=generator).argsort(-1).to(torch.int32)
    visible = torch.ones(BATCH, length, dtype=torch.bool)
    if hidden:
        visible = torch.rand(BATCH, length, generator=generator) < 0.5
        visible[1] = False  # nobody sees anything
        slots = torch.arange(length) if rows is None else rows[0, 0].long()
        visible[0, slots[: block[1]]] = False  # a block without visible tokens
    return _Case(q, k, v, kept, rows, visible, block, tokens or block[1])


def _exact(case: _Case, *, means: bool = True, weight: str = "ln n") -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64, query block by query block; of kept blocks alone without ``means``."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full((BATCH, HEADS, case.q.shape[1]), -torch.inf, dtype=torch.float64)
    kept = case.kept.expand(BATCH, HEADS, -1, -1)
    for b in range(BATCH):
        for h in range(HEADS):
            order = torch.arange(case.q.shape[1])
            if case.rows is not None:
                order = case.rows.expand(BATCH, HEADS, -1)[b, h].long()
            q, k, v = (x[b, :, h].double() for x in (case.q, case.k, case.v))
            for i, asking in enumerate(order.split(case.block[0])):
                keys, values, bias = [], [], []
                for j, block in enumerate(order.split(case.block[1])):
                    if kept[b, h, i, j]:
                        members = block[case.visible[b, block]]
                        keys.append(k[members])
                        values.append(v[members])
                        bias.append(torch.zeros(len(members), dtype=torch.float64))
                    elif means:
                        for run in block.split(case.tokens):
                            members = run[case.visible[b, run]]
                            if len(members):
                                count = {"ln n": len(members), "whole": case.tokens, "none": 1}[weight]
                                keys.append(k[members].mean(0, keepdim=True))
                                values.append(v[members].mean(0, keepdim=True))
                                bias.append(torch.tensor([count], dtype=torch.float64).log())
                if keys and len(torch.cat(keys)):
                    logits = SCALE * q[asking] @ torch.cat(keys).T + torch.cat(bias)
                    out[b, asking, h] = logits.softmax(-1) @ torch.cat(values)
                    lse[b, h, asking] = logits.logsumexp(-1)
    return out, lse


def _found(case: _Case, backend: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """By the operation, from what attention to the kept blocks gave in the case's dtype."""
    out, lse = _exact(case, means=False)
    q, k, v, visible = (x.to(device) for x in (case.q, case.k, case.v, case.visible))
    rows = None if case.rows is None else case.rows.to(device)
    hides = not bool(case.visible.all())
    mask = visible if hides else None
    keys, values = (pool_blocks(x, case.tokens, rows=rows, key_mask=mask, backend="torch") for x in (k, v))
    counts = None
    if hides:
        order = torch.arange(q.shape[1], device=device).expand(1, 1, -1) if rows is None else rows.long()
        seen = torch.take_along_dim(visible[:, None], order, 2).float()
        seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % case.tokens))
        counts = seen.unflatten(-1, (-1, case.tokens)).sum(-1)
    means = BlockMeans(keys, values, case.tokens, case.block[1], q.shape[1], counts)
    out, lse = out.to(device, q.dtype), lse.to(device, torch.float32)
    bits = pack_bits(case.kept).to(device)
    given = {"block_q": case.block[0], "rows": rows, "scale": SCALE, "backend": backend}
    out, lse = add_left_out_means(out, lse, q, means, bits, **given)
    return out.cpu(), lse.cpu()


def _bound(case: _Case) -> tuple[float, float]:
    """Of the output's and of the log-sum-exp's error, from the largest logits and values.

    A mean's logit errs by eps for each of D products and for each of its sums, and by what rounds the mean to the
    dtype, half of its eps; the log-sum-exp of the kept blocks, which is one logit more, by eps of itself. A weight errs
    by twice the largest of them, and the sum over n means by n eps. Besides, weights, values and outputs are rounded to
    the dtype.
    """
    eps, half_unit = torch.finfo(torch.float32).eps, torch.finfo(case.q.dtype).eps / 2
    mean = pool_blocks(case.k, case.tokens, rows=case.rows, key_mask=case.visible, backend="torch")
    size = SCALE * float(case.q.double().norm(dim=-1).max() * mean.norm(dim=-1).max())
    logit = ((DIM + 8) * eps + half_unit) * size
    before = _exact(case, means=False)[1]
    logit = max(logit, 4 * eps * float(before.nan_to_num(neginf=0.0).abs().max()))
    summed = (mean.shape[2] + 8) * eps
    return (2 * logit + summed + 4 * half_unit) * float(case.v.double().abs().max()), logit + summed


CASES = {
    "64 x 64": _case((64, 64), 320),
    "128 x 64, ragged": _case((128, 64), 301),
    "128 x 128, ragged": _case((128, 128), 400),
    "32 x 64, one mask for all heads": _case((32, 64), 150, heads=1),
    "more means than a tile": _case((64, 16), 1200),
    "the last mean of a whole tile is short": _case((64, 16), 253),
    "blocks that are no power of two": _case((48, 24), 250),
    "means of 16": _case((64, 64), 301, tokens=16),
    "permuted": _case((64, 64), 301, permuted="alike"),
    "permuted head by head": _case((64, 32), 301, permuted="each"),
    "hidden keys": _case((64, 32), 301, hidden=True),
    "hidden keys, permuted": _case((64, 32), 301, hidden=True, permuted="each", tokens=8),
    "one block": _case((64, 64), 50),
    # float16: the interpreter cuts bfloat16 off where a GPU rounds.
    "half": _case((64, 64), 301, permuted="each", dtype=torch.float16),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_one_softmax_over_kept_keys_and_means(name, backend, device):
    case = CASES[name]
    out, lse = _exact(case)
    found, found_lse = _found(case, backend, device)
    assert found.dtype == case.q.dtype
    of_out, of_lse = _bound(case)
    assert float((found.double() - out).abs().max()) <= of_out
    assert torch.equal(found_lse == -torch.inf, lse == -torch.inf)
    seen = lse > -torch.inf
    assert float((found_lse.double() - lse)[seen].abs().max()) <= of_lse
    # What it must not be: without means, with means of no weight, and with a short mean that weighs as a whole one.
    assert float((_exact(case, means=False)[0] - out).abs().max()) > 4 * of_out
    assert float((_exact(case, weight="none")[1] - lse)[seen].abs().max()) > 4 * of_lse
    if case.q.shape[1] % case.tokens or not bool(case.visible.all()):
        assert float((_exact(case, weight="whole")[1] - lse)[seen].abs().max()) > 4 * of_lse
    read_too = replace(case, kept=torch.zeros_like(case.kept))
    assert float((_exact(read_too)[0] - out).abs().max()) > 4 * of_out or case.kept.shape[2] == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_left_out_changes_nothing(backend, device):
    case = CASES["128 x 64, ragged"]
    case = replace(case, kept=torch.ones_like(case.kept))
    before = _exact(case)
    found, found_lse = _found(case, backend, device)
    # One rounding to float32 before, and one division or product and one logarithm after.
    assert torch.allclose(found, before[0].float(), rtol=4e-7, atol=0.0)
    assert torch.allclose(found_lse, before[1].float(), rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_shows_in_its_row(backend, device):
    case = CASES["64 x 64"]
    q = case.q.clone()
    q[0, 5, 1, 3] = torch.nan
    out, lse = _found(replace(case, q=q), backend, device)
    assert out[0, 5, 1].isnan().all()
    assert lse[0, 1, 5].isnan()
    assert int(out.isnan().sum()) == DIM


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bits_of_lists_are_those_that_are_kept(backend, device):
    keep = CASES["128 x 64, ragged"].kept.to(device)
    lists = BlockMask.from_dense(keep, 128, 64, 301, 301, backend="torch")
    wanted = pack_bits(keep)
    assert torch.equal(kept_bits(lists, backend), wanted)
    assert torch.equal(kept_bits(PackedBlockMask.of(lists, False, backend), backend), wanted)


def test_the_choice_says_why():
    case = Case(torch.device("cpu"), torch.float64)
    assert choose_means(case).name == "torch"
    with pytest.raises(ValueError, match=r"cannot run residual here: .*float64"):
        choose_means(case, "triton")
