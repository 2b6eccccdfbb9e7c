"""Attention with integer weights and values, exactly as integer matrix units would compute it, in plain torch.

PAROAttention (arXiv 2506.16054) quantises the attention map per tile, aligned with the blocks of the mask, and
the values to integers of 8 or 4 bits. Hopper has no INT4 matrix unit, and its INT8 weights would have to pass
from registers through a layout exchange that FP8 weights need not; so this shows what the numbers cost in
fidelity, on any device, and is no faster than full precision.
"""

from __future__ import annotations

import torch

from ..common.quantized_inputs import QuantizedInputs, dequantize
from ..mask.block_mask import BlockMask


def integer_weight_attention(
    quantized: QuantizedInputs,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]`` (float32) of inputs with integer values.

    A row's probabilities are rounded to ``0..127`` times the largest of their tile (block pair) over 127; sums
    over the keys of a tile are integers, exact in float32 since ``127 * 127 * 128 < 2 ** 24``.
    """
    q, k, _ = dequantize(quantized, mask.block_k)
    assert quantized.v_scale is not None
    if quantized.smooth_q:
        q = q + quantized.q_mean.repeat_interleave(mask.block_q, 2)
    batch, heads, _, dim = q.shape
    blocks_k, values = (x.unflatten(2, (-1, mask.block_k)) for x in (k, quantized.v.float()))
    visible_keys = _visible_keys(mask, rows, key_mask, batch, heads, q.device)
    out = torch.zeros(batch, heads, q.shape[2], dim, device=q.device)
    lse = torch.full((batch, heads, q.shape[2]), -torch.inf, device=q.device)
    lead_b = torch.arange(batch, device=q.device)[:, None, None]
    lead_h = torch.arange(heads, device=q.device)[None, :, None]
    nq, nk = mask.num_blocks
    counts, fulls, index = (
        x.expand(batch, heads, *x.shape[2:]) for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices)
    )
    for i in range(nq):
        width = int(counts[:, :, i].max())
        if width == 0:
            continue
        slot = torch.arange(width, device=q.device)
        ids = index[:, :, i, :width].long()
        listed = slot < counts[:, :, i, None]
        ids = torch.where(listed, ids, 0).clamp(0, nk - 1)
        partial = slot >= fulls[:, :, i, None]
        at = slice(i * mask.block_q, (i + 1) * mask.block_q)
        scores = torch.einsum("bhqd,bhjkd->bhqjk", q[:, :, at], blocks_k[lead_b, lead_h, ids]) * scale
        seen = visible_keys[lead_b, lead_h, ids][:, :, None] | ~partial[:, :, None, :, None]
        if mask.kv_bits is not None and mask.token_bits is not None and len(mask.token_bits):
            seen = seen & _seen_by_bits(mask, i, width, partial & listed)
        scores = scores.masked_fill(~(seen & listed[:, :, None, :, None]), -torch.inf)
        total = scores.flatten(-2).logsumexp(-1)
        lse[:, :, at] = total
        weights = torch.exp(scores - torch.where(total.isfinite(), total, 0.0)[..., None, None])
        step = weights.amax((2, 4), keepdim=True).clamp_min(1e-30) / 127
        whole = (weights / step).round()
        products = torch.einsum("bhqjk,bhjkd->bhqjd", whole, values[lead_b, lead_h, ids])
        grid = quantized.v_scale[lead_b, lead_h, ids][:, :, None]
        out[:, :, at] = (products * grid * step).sum(3)
    lse = lse[:, :, : mask.q_len] + quantized.q_shift[:, :, : mask.q_len] * scale
    out = out[:, :, : mask.q_len]
    if rows is not None:
        to = rows.long().expand(batch, heads, -1)
        out = torch.empty_like(out).scatter_(2, to[..., None].expand_as(out), out)
        lse = torch.empty_like(lse).scatter_(2, to, lse)
    return out.transpose(1, 2), lse


def _visible_keys(
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    batch: int,
    heads: int,
    device: torch.device,
) -> torch.Tensor:
    """bool ``[B, H, nk, block_k]``: keys of a partial block that exist and are not hidden, in the mask's order."""
    seen = torch.ones(batch, heads, mask.kv_len, dtype=torch.bool, device=device)
    if key_mask is not None:
        seen = key_mask[:, None].expand_as(seen)
        if rows is not None:
            seen = seen.gather(-1, rows.long().expand_as(seen))
    nk = mask.num_blocks[1]
    return torch.nn.functional.pad(seen, (0, nk * mask.block_k - mask.kv_len)).unflatten(-1, (nk, mask.block_k))


def _seen_by_bits(mask: BlockMask, row: int, width: int, masked: torch.Tensor) -> torch.Tensor:
    """bool ``[B, H, block_q, width, block_k]`` of one query block's entries; ``masked`` says which have bits."""
    assert mask.kv_bits is not None
    assert mask.token_bits is not None
    bit_rows = mask.kv_bits[:, :, row, :width].expand(masked.shape)
    bit_rows = torch.where(masked, bit_rows, -1)
    words = mask.token_bits[bit_rows.clamp_min(0).long()]
    shift = torch.arange(32, device=words.device, dtype=torch.int32)
    seen = ((words[..., None] >> shift) & 1).bool().flatten(-2)
    return (seen | (bit_rows < 0)[..., None, None]).transpose(2, 3)
