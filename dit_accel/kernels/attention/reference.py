"""Reference block-sparse attention: plain torch through the token mask; an oracle, quadratic in memory."""

from __future__ import annotations

import torch

from ..mask.block_mask import BlockMask


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention in float64 for float64 inputs, else in float32.

    Arguments and results are those of :func:`dit_accel.kernels.block_sparse_attention` after validation.

    Returns:
        ``out [B, Sq, H, D]`` in ``q.dtype`` and ``lse [B, H, Sq]``, float64 for float64 inputs, else float32.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    visible = mask.to_tokens().expand(batch, heads, q_len, kv_len)
    if rows is not None:
        # Entry (m, n) of the permuted mask speaks of the tokens rows[m] and rows[n].
        place = torch.argsort(rows.long(), dim=-1).expand(batch, heads, q_len)
        visible = visible.gather(2, place[..., None].expand(-1, -1, -1, kv_len))
        visible = visible.gather(3, place[:, :, None, :].expand(-1, -1, q_len, -1))
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]

    qh, kh, vh = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    scores = (qh @ kh.transpose(-1, -2)) * scale
    some = visible.any(-1, keepdim=True)
    # A row that sees nothing keeps finite scores, so that its gradient is zero and not NaN.
    scores = scores.masked_fill(~visible & some, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.exp(scores - lse) @ vh
    out = torch.where(some, out, torch.zeros((), dtype=dtype, device=q.device))
    lse = lse.masked_fill(~some, float("-inf"))
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.squeeze(-1)
