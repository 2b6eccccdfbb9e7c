"""Rectified compensation against the paper's equations, written out in float64."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.selection.api import pool_blocks, select_blocks
from dit_accel.kernels.selection.rectified import (
    add_pooled_compensation,
    gain_exceeds_error,
    pool_deviation,
    pooled_attention,
)

from .test_selection import NAMED


def blocks_of(x, block, b, h, rows, key_mask=None):
    """The visible tokens of each block of one head, float64."""
    order = list(range(x.shape[1]))
    if rows is not None:
        order = rows[min(b, rows.shape[0] - 1), min(h, rows.shape[1] - 1)].tolist()
    parts = [order[n : n + block] for n in range(0, len(order), block)]
    if key_mask is not None:
        parts = [[n for n in part if key_mask[b, n]] for part in parts]
    return [x[b, part, h].double() for part in parts], parts


CASES = [
    # batch, seq, heads, dim, block_q, block_k, text, permuted, masked
    (1, 96, 1, 16, 32, 16, None, False, False),
    (2, 90, 2, 24, 32, 16, (64, 90), False, False),
    (1, 110, 2, 32, 16, 16, (0, 32), True, False),
    (2, 100, 2, 16, 32, 32, (96, 100), True, True),
]


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rectified(backend, case, device):
    batch, seq, heads, dim, block_q, block_k, text, permuted, masked = case
    gen = torch.Generator().manual_seed(0)
    q, k, v, start = (torch.randn(batch, seq, heads, dim, generator=gen) for _ in range(4))
    # Tokens of a block are more alike early in the sequence, so that the gain wins in some blocks only.
    spread = torch.linspace(0.1, 1.0, seq)[torch.randperm(seq, generator=gen) if permuted else slice(None)]
    q, k = (x * spread[None, :, None, None] + 1.0 for x in (q, k))
    rows = None
    if permuted:
        rows = spread.argsort().expand(1, heads, seq).to(torch.int32)
    key_mask = torch.rand(batch, seq, generator=gen) > 0.2 if masked else None
    on = [x.to(device) if x is not None else None for x in (q, k, v, start, rows, key_mask)]
    options = {"rows": on[4], "backend": backend}
    prob, text_mass = pooled_attention(on[0], on[1], block_q, block_k, text=text, key_mask=on[5], **options)
    gain = gain_exceeds_error(on[0], on[1], block_q, block_k, key_mask=on[5], **options)
    nk = prob.shape[-1]
    kept = select_blocks(prob, density=0.3, block_q=block_q, block_k=block_k, q_len=seq, kv_len=seq, backend="torch")
    out = add_pooled_compensation(on[3].clone(), on[2], prob, kept, gain, **{**options, "key_mask": on[5]})
    keep = kept.to_dense().cpu()
    want = torch.zeros(batch, seq, heads, dim, dtype=torch.float64)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        q_parts, q_slots = blocks_of(q, block_q, b, h, rows)
        k_parts, _ = blocks_of(k, block_k, b, h, rows, key_mask)
        v_parts, _ = blocks_of(v, block_k, b, h, rows, key_mask)
        is_text = [text is not None and text[0] <= j * block_k < text[1] for j in range(nk)]
        for i, tokens in enumerate(q_parts):
            mean = tokens.mean(0)
            # The paper: exponentials of pooled logits times the block's length, text tokens one by one.
            mass = torch.zeros(nk, dtype=torch.float64)
            text_sum = 0.0
            for j, keys in enumerate(k_parts):
                if is_text[j]:
                    text_sum += float((keys @ mean * dim**-0.5).exp().sum())
                elif len(keys):
                    mass[j] = len(keys) * (keys.mean(0) @ mean * dim**-0.5).exp()
            total = mass.sum() + text_sum
            torch.testing.assert_close(prob[b, h, i].cpu().double(), mass / total, atol=1e-5, rtol=1e-4)
            assert abs(float(text_mass[b, h, i]) - text_sum / float(total)) < 1e-5
            share, extra = 1.0, torch.zeros(dim, dtype=torch.float64)
            for j, keys in enumerate(k_parts):
                if not len(keys):
                    continue
                away_q, away_k = (tokens - mean).abs().mean(0), (keys - keys.mean(0)).abs().mean(0)
                error = (away_q @ keys.mean(0)).abs() + (mean @ away_k).abs()
                wins = bool((mean @ keys.mean(0)).abs() > error)
                if abs((mean @ keys.mean(0)).abs() - error) > 1e-4:
                    assert bool(gain[b, h, i, j]) == wins
                if wins and not keep[b, h, i, j]:
                    share = share - mass[j] / total
                    extra = extra + mass[j] / total * v_parts[j].mean(0)
            want[b, q_slots[i], h] = share * start[b, q_slots[i], h].double() + extra
    assert gain.any()
    assert not gain.all()
    assert (out.cpu() - want).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", NAMED)
def test_deviation_is_zero_for_equal_tokens(backend, device):
    x = torch.ones(1, 40, 2, 8, device=device) * 3
    mean = pool_blocks(x, 16)
    assert (pool_deviation(x, mean, 16, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", NAMED)
def test_deviation(backend, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 75, 2, 24, generator=generator) + 2.0
    rows = torch.stack([torch.randperm(75, generator=generator) for _ in range(2)])[None].to(torch.int32)
    key_mask = torch.rand(2, 75, generator=generator) > 0.4
    x[1, ~key_mask[1]] = torch.nan  # a padded prompt may hold it
    on = [t.to(device) for t in (x, rows, key_mask)]
    mean = pool_blocks(on[0], 32, rows=on[1], key_mask=on[2])
    found = pool_deviation(on[0], mean, 32, rows=on[1], key_mask=on[2], backend=backend)
    for b in range(2):
        for h in range(2):
            parts, _ = blocks_of(x, 32, b, h, rows, key_mask)
            want = torch.stack([(tokens - tokens.mean(0)).abs().mean(0) for tokens in parts])
            torch.testing.assert_close(found[b, h].cpu().double(), want, atol=1e-5, rtol=1e-5)


def test_errors():
    q = torch.randn(1, 64, 1, 8)
    with pytest.raises(ValueError, match="whole key blocks"):
        pooled_attention(q, q, 16, 16, text=(8, 64))
    kept = select_blocks(torch.zeros(1, 1, 4, 4), density=0.5, block_q=16, block_k=16, q_len=64, kv_len=64)
    with pytest.raises(ValueError, match="kept covers"):
        add_pooled_compensation(q, q, torch.zeros(1, 1, 4, 3), kept)
