"""Rectified sparse attention: what pooled attention says about the blocks left out (arXiv 2511.19835).

Three parts. *Isolated-pool reallocation*: a pooled block stands for its tokens, so its logit gets the
logarithm of their number, while text tokens stay un-pooled in the same softmax (the paper multiplies and
renormalises, which is the same). *Gain-aware rectification*: a block left out is compensated only where the
pooled logit exceeds the error that pooling may make. *Epilogue*: ``out = R * sparse + sum of p_J mean(V_J)``
over the compensated blocks, with R the mass of everything else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.capability import why_not_kernels
from ..common.choice import Case, Choice, case_of, choose
from ..common.scale import scale_of
from ..common.tokens import gather_mask, gather_rows
from ..mask.block_mask import BlockMask
from .api import pool_blocks, pooled_scores


def choose_rectified(case: Case, backend: str = "auto") -> Choice:
    """The backend of this module's operations; raises a ValueError if it is refused."""
    gradients = "the triton kernels have no gradients" if case.recorded else None
    return choose("rectified", backend, case, why_not_kernels(case) or gradients)


def pooled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    text: tuple[int, int] | None = None,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of block means over key blocks, with text keys un-pooled.

    Args:
        q, k: ``[B, S, H, D]``, any strides.
        block_q, block_k: tokens in a query and in a key block.
        text: optional span ``(start, stop)`` of text slots; it must cover whole key blocks.
        rows, key_mask, scale, backend: see :func:`dit_accel.kernels.selection.api.pooled_scores`.

    Returns:
        ``(blocks, text)``: float32 ``[B, H, nq, nk]`` (0 for text and for hidden blocks) and the text's mass
        ``[B, H, nq]``; together a row sums to 1.
    """
    seq = k.shape[1]
    scale = scale_of(q, scale)
    logits = pooled_scores(q, k, block_q, block_k, rows=rows, key_mask=key_mask, scale=scale, backend=backend)
    nk = logits.shape[-1]
    visible = torch.ones(1, 1, seq, dtype=torch.bool, device=k.device)
    if key_mask is not None:
        visible = gather_mask(key_mask, rows)
    count = F.pad(visible, (0, nk * block_k - seq)).unflatten(-1, (nk, block_k)).sum(-1)
    bias = count.float().log()
    if text is None:
        prob = (logits + bias[:, :, None]).softmax(-1)
        return prob, torch.zeros_like(prob[..., 0])
    start, stop = text
    if not 0 <= start < stop <= seq or start % block_k or (stop % block_k and stop != seq):
        raise ValueError(f"text must be a span of whole key blocks of {block_k} within {seq} tokens, got {text}.")
    bias = bias.clone()
    bias[..., start // block_k : -(-stop // block_k)] = -torch.inf
    if rows is None:
        k_text = k[:, start:stop].transpose(1, 2)
    else:
        k_text = torch.take_along_dim(k.transpose(1, 2), rows[..., start:stop].long()[..., None], dim=2)
    q_mean = pool_blocks(q, block_q, rows=rows, backend=backend)
    text_logits = (q_mean * scale) @ k_text.float().transpose(-1, -2)
    text_logits = torch.where(visible[:, :, None, start:stop], text_logits, -torch.inf)
    prob = torch.cat([logits + bias[:, :, None], text_logits], -1).softmax(-1)
    return prob[..., :nk], prob[..., nk:].sum(-1)


def pool_deviation(
    x: torch.Tensor,
    mean: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean absolute deviation of the valid tokens of each block from its mean, float32 ``[B, H, n, D]``.

    ``mean`` is what :func:`dit_accel.kernels.selection.api.pool_blocks` gives for the same arguments. The torch
    version takes heads one at a time to keep the memory small.
    """
    if choose_rectified(Case(x.device), backend).name == "triton":
        from .triton.spread import pool_deviation_triton

        return pool_deviation_triton(x, mean, block, rows=rows, key_mask=key_mask)
    seq, heads = x.shape[1:3]
    pad = -seq % block
    visible = torch.ones(1, 1, seq, dtype=torch.bool, device=x.device)
    if key_mask is not None:
        visible = gather_mask(key_mask, rows)
    visible = F.pad(visible, (0, pad)).unflatten(-1, (-1, block))[..., None]
    out = torch.empty_like(mean)
    for h in range(heads):
        some = slice(h, h + 1)
        rows_h = rows if rows is None or rows.shape[1] == 1 else rows[:, some]
        seen = visible if visible.shape[1] == 1 else visible[:, some]
        tokens = F.pad(gather_rows(x[:, :, some], rows_h).float(), (0, 0, 0, pad)).unflatten(2, (-1, block))
        away = torch.where(seen, (tokens - mean[:, some, :, None]).abs(), 0.0)
        out[:, some] = away.sum(3) / seen.sum(3).clamp(min=1)
    return out


def gain_exceeds_error(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Where a pooled block may stand in: ``|Q.K| > |dQ.K| + |Q.dK|`` on block means and mean deviations.

    Args:
        means: the block means of q and k, float32 ``[B, H, n, D]``, where they are at hand.

    Returns:
        bool ``[B, H, nq, nk]``.
    """
    if means is None:
        means = (
            pool_blocks(q, block_q, rows=rows, backend=backend),
            pool_blocks(k, block_k, rows=rows, key_mask=key_mask, backend=backend),
        )
    q_mean, k_mean = means
    q_away = pool_deviation(q, q_mean, block_q, rows=rows, backend=backend)
    k_away = pool_deviation(k, k_mean, block_k, rows=rows, key_mask=key_mask, backend=backend)
    k_mean_t = k_mean.transpose(-1, -2)
    error = (q_away @ k_mean_t).abs() + (q_mean @ k_away.transpose(-1, -2)).abs()
    return (q_mean @ k_mean_t).abs() > error


def add_pooled_compensation(
    out: torch.Tensor,
    v: torch.Tensor,
    prob: torch.Tensor,
    kept: BlockMask,
    compensated: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``out = R * out + sum of prob_J mean(V_J)``, over blocks neither kept nor ruled out.

    Differentiable in out and v: R and the shares are constants.

    Args:
        out: ``[B, S, H, D]``, the sparse attention's output over ``kept``; changed in place and returned, but where
            gradients are recorded.
        v: ``[B, S, H, D]``.
        prob: float32 ``[B, H, nq, nk]``, from :func:`pooled_attention`.
        kept: the blocks that the sparse attention read.
        compensated: optional bool ``[B, H, nq, nk]``, from :func:`gain_exceeds_error`; the mass of blocks
            that are neither kept nor compensated goes to the sparse output, as the paper has it.
        rows: see :func:`dit_accel.kernels.selection.api.pool_blocks`.
        key_mask: likewise.
        backend: likewise.
    """
    seq, block_q = out.shape[1], kept.block_q
    if (kept.q_len, kept.kv_len) != (seq, v.shape[1]) or tuple(prob.shape[2:]) != kept.num_blocks:
        raise ValueError(
            f"kept covers {kept.q_len} x {kept.kv_len} tokens in {kept.num_blocks} blocks, out and v have "
            f"{seq} x {v.shape[1]} and prob is {tuple(prob.shape)}."
        )
    case = case_of(out, v)
    backend = choose_rectified(case, backend).name
    left_out = ~kept.to_dense()
    if compensated is not None:
        left_out = left_out & compensated
    weight = torch.where(left_out, prob, 0.0)
    share = 1.0 - weight.sum(-1)
    extra = weight @ pool_blocks(v, kept.block_k, rows=rows, key_mask=key_mask, backend=backend)
    if backend == "triton":
        from .triton.rectified import blend_blocks_triton

        return blend_blocks_triton(out, share, extra, block_q, rows)
    block_of = torch.arange(seq, device=out.device) // block_q
    share, extra = share[:, :, block_of, None], extra[:, :, block_of]
    if rows is not None:
        slot_of = rows.long().expand(*share.shape[:2], seq).argsort(-1)[..., None]
        share, extra = share.gather(2, slot_of), extra.gather(2, slot_of.expand_as(extra))
    blended = out * share.transpose(1, 2) + extra.transpose(1, 2)
    # The attention's gradient needs its output as it was.
    return blended.to(out.dtype) if case.recorded else out.copy_(blended)
