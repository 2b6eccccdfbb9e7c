"""Pyramid sparse attention: far blocks are read as averages of 2, 4 or 8 neighbouring keys (PSA, ziplab).

A key block at level L is replaced by the means of its runs of L consecutive tokens, keys and values alike,
and each mean's logit gets ``+ ln L`` because it stands for L tokens; all levels share one softmax. Level 1 is
exact, level 0 is not read. Runs that are cut short, by the end of the sequence or by hidden keys, are means
of what is there and get the logarithm of that count, so that the total weight stays that of the tokens.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from ..common.capability import why_not_tiles
from ..common.choice import Case, Choice, case_of, choose
from ..common.scale import scale_of
from ..common.tokens import gather_mask, gather_rows
from .levels import LEVELS, pool_level

CHUNK_LOGITS = 1 << 24
"""The torch version holds about this many logits at a time."""


def choose_pyramid(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`pyramid_attention`; raises a ValueError if it is refused."""
    return choose("pyramid", backend, case, why_not_tiles(case))


def pyramid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose query blocks read each key block at a level of their own.

    Differentiable in q, k and v, also through the denominators.

    Args:
        q: ``[B, Sq, H, D]``, any strides.
        k: ``[B, Sk, H, D]``, any strides.
        v: as ``k``.
        levels: int ``[B|1, H|1, nq, nk]`` of 0 (not read), 1, 2, 4, 8. Text blocks should have level 1.
        block_q: tokens in a query block.
        block_k: tokens in a key block, a multiple of 8.
        rows: see :func:`dit_accel.kernels.selection.api.pool_blocks`; output in original order.
        key_mask: see :func:`dit_accel.kernels.selection.api.pool_blocks`.
        scale: softmax scale, ``D ** -0.5`` when left out.
        return_lse: also return the natural log of the denominators, float32 ``[B, H, Sq]``.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA, with gradients too;
            the torch version computes every logit.

    Returns:
        ``[B, Sq, H, D]`` in q's dtype; a query that reads nothing gives 0 (and -inf).
    """
    nq, nk = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    if block_k % LEVELS[-1]:
        raise ValueError(f"block_k must be a multiple of {LEVELS[-1]}, got {block_k}.")
    if levels.dim() != 4 or tuple(levels.shape[2:]) != (nq, nk):
        raise ValueError(f"levels must be [B, H, {nq}, {nk}] for this geometry, got {tuple(levels.shape)}.")
    scale = scale_of(q, scale)
    case = case_of(q, k, v, blocks=(block_q, block_k))
    if choose_pyramid(case, backend).name == "triton":
        if case.recorded:
            from .triton.backward import PyramidAttention

            out, lse = PyramidAttention.apply(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
        else:
            from .triton.forward import pyramid_attention_triton

            out, lse = pyramid_attention_triton(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
    else:
        out, lse = _pyramid_attention_torch(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
    return (out, lse) if return_lse else out


def _pyramid_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    visible = None if key_mask is None else gather_mask(key_mask, rows)
    q_slots = gather_rows(q, rows).to(wide) * scale
    k_slots, v_slots = gather_rows(k, rows).to(wide), gather_rows(v, rows).to(wide)
    keys, values, bias, level_of, block_of = [], [], [], [], []
    for level in LEVELS:
        k_mean, count = pool_level(k_slots, visible, level)
        keys.append(k_mean)
        values.append(pool_level(v_slots, visible, level)[0])
        bias.append(count.to(wide).log().expand(batch, -1, -1))
        runs = torch.arange(k_mean.shape[2], device=q.device)
        block_of.append(runs * level // block_k)
        level_of.append(torch.full_like(runs, level))
    k_all, v_all = torch.cat(keys, 2).transpose(-1, -2), torch.cat(values, 2)
    bias_all = torch.cat(bias, 2)[:, :, None]
    block_all, level_all = torch.cat(block_of), torch.cat(level_of)
    step = max(1, CHUNK_LOGITS // (batch * heads * block_q * k_all.shape[-1])) * block_q
    outs, lses = [], []

    def attend(
        q_part: torch.Tensor, k_all: torch.Tensor, v_all: torch.Tensor, bias_all: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row_block = torch.arange(start, start + q_part.shape[2], device=q.device) // block_q
        read = levels[:, :, row_block][..., block_all] == level_all
        logits = torch.where(read, q_part @ k_all + bias_all, -torch.inf)
        lse = logits.logsumexp(-1)
        prob = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        return prob @ v_all, lse

    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for start in range(0, q_len, step):
        inputs = (q_slots[:, :, start : min(start + step, q_len)], k_all, v_all, bias_all, start)
        # Without recomputation autograd would keep the logits of all chunks.
        out, lse = checkpoint(attend, *inputs, use_reentrant=False) if recorded else attend(*inputs)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    if rows is not None:
        index = rows.long().expand(batch, heads, q_len)
        out = torch.zeros_like(out).scatter(2, index[..., None].expand_as(out), out)
        lse = torch.zeros_like(lse).scatter(2, index, lse)
    return out.transpose(1, 2).to(q.dtype), lse if wide == torch.float64 else lse.float()
