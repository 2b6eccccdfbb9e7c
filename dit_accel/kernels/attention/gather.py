"""Block-sparse attention on any device: gather the kept key blocks, then dense attention over them.

Query blocks with the same number of kept blocks run as one batch of ``scaled_dot_product_attention``. Only
query blocks that list partial key blocks build a mask tensor. Work and memory follow the mask's density.

On a CPU beside other work, set ``OMP_WAIT_POLICY=passive`` before torch is imported, as the command line does: GNU
OpenMP's threads otherwise wait busily for one that does not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..common.tokens import gather_rows
from ..mask.block_mask import BlockMask

# What one chunk gathers and, where they are tensors, its scores. On a CPU every operation of a chunk is a parallel
# region, at whose end threads wait for each other: on a busy machine many small ones take several times as long as
# few large ones. On a GPU one launch should fill the chip.
_CHUNK_BYTES_CPU = 32 << 20
_CHUNK_BYTES_GPU = 256 << 20
# Scores and weights in float32, or the token bits and what becomes of them.
_SCORE_BYTES = 8
# Runs of equal counts shorter than this share a chunk, padded to its longest row and masked.
_MIN_ROWS = 4


@dataclass(frozen=True)
class _Chunk:
    """Query blocks that run together.

    Attributes:
        row_ids: int64 ``[n]``, query blocks numbered over batch, head and block.
        span: begin and end when ``row_ids`` is that range, so that views do instead of copies.
        count: key blocks gathered for each.
        masked: whether any key of the gathered blocks must be hidden.
        short: the last gathered block is the ragged end of the sequence for all; it is cut, not masked.
    """

    row_ids: torch.Tensor
    span: slice | None
    count: int
    masked: bool
    short: bool


class Clip(NamedTuple):
    """What makes weights of a softmax into clipped ones (arXiv 2306.12929): ``clip((zeta - gamma) P + gamma, 0, 1)``
    with ``gamma = -alpha / n``, where a query sees ``n`` keys.

    Attributes:
        alpha: ``[H]``, at least 0: a weight below about so many times the mean weight becomes none.
        zeta: at least 1: a weight above about ``1 / zeta`` becomes one.
    """

    alpha: torch.Tensor
    zeta: float

    def change(self, weights: torch.Tensor, heads: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        """Clipped weights less weights ``[n, block_q, keys]``, of which hidden keys have 0.

        Args:
            heads: int64 ``[n]``, whose weights these are.
            count: of the keys that each query sees.
        """
        lowered = self.alpha.to(weights.dtype)[heads, None, None] / count
        # Not clamp(): at its lower bound, where hidden keys are if alpha is 0, that has a gradient.
        return torch.relu((self.zeta + lowered) * weights - lowered).clamp(max=1.0) - weights


def gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float,
    return_lse: bool,
    clip: Clip | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the kept blocks by gathering them; differentiable, extra memory bounded by the chunk.

    Arguments and results are those of :func:`dit_accel.kernels.block_sparse_attention` after validation. With ``clip``,
    which needs ``return_lse``, the output is what clipping changes.
    The grouping reads the counts on the host, so on an accelerator a call synchronises.
    """
    batch, q_len, heads, dim = q.shape
    nq, nk = mask.num_blocks
    query = _to_blocks(q, rows, nq, mask.block_q).view(-1, mask.block_q, dim)
    key = _to_blocks(k, rows, nk, mask.block_k).view(-1, mask.block_k * dim)
    value = _to_blocks(v, rows, nk, mask.block_k).view(-1, mask.block_k * dim)
    block_bytes = 2 * mask.block_k * dim * q.element_size()
    if return_lse or mask.token_bits is not None:
        block_bytes += mask.block_q * mask.block_k * _SCORE_BYTES
    plan = _Plan.build(mask, batch, heads, rows, key_mask, block_bytes)

    inputs = (q, k, v) if clip is None else (q, k, v, clip.alpha)
    run = _run_recorded if torch.is_grad_enabled() and any(x.requires_grad for x in inputs) else _run
    out, lse = run(query, key, value, plan, scale, return_lse, clip)
    if lse is not None:
        lse = (lse if plan.back is None else lse.index_select(0, plan.back)).view(batch, heads, -1)[..., :q_len]
    if rows is None:
        out = out if plan.back is None else out.index_select(0, plan.back)
        return out.view(batch, heads, -1, dim)[:, :, :q_len].transpose(1, 2), lse
    # Output token s of head h comes from slot place[s] of the permuted sequence; both orders undone in one copy.
    rows = rows.long().expand(batch, heads, q_len)
    place = torch.empty_like(rows).scatter_(-1, rows, torch.arange(q_len, device=q.device).expand_as(rows))
    lse = None if lse is None else lse.gather(-1, place)
    lead = torch.arange(batch * heads, device=q.device).view(batch, heads, 1) * nq
    block = lead + place // mask.block_q
    block = block if plan.back is None else plan.back[block]
    flat = (block * mask.block_q + place % mask.block_q).transpose(1, 2).reshape(-1)
    return out.view(-1, dim).index_select(0, flat).view(batch, q_len, heads, dim), lse


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: _Plan,
    scale: float,
    return_lse: bool,
    clip: Clip | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All chunks, their query blocks one after another."""
    out = torch.empty_like(query)
    # One buffer for all chunks: fresh pages for each cost a CPU a tenth of the time.
    rows = max((len(chunk.row_ids) * chunk.count for chunk in plan.chunks), default=0)
    buffers = key.new_empty(rows, key.shape[1]), value.new_empty(rows, value.shape[1])
    lse = torch.empty(query.shape[:2], dtype=_lse_dtype(query), device=query.device) if return_lse else None
    begin = 0
    for chunk in plan.chunks:
        end = begin + len(chunk.row_ids)
        out[begin:end], part_lse = _attend_chunk(query, key, value, plan, chunk, scale, return_lse, clip, buffers)
        if lse is not None and part_lse is not None:
            lse[begin:end] = part_lse
        begin = end
    return out, lse


def _run_recorded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: _Plan,
    scale: float,
    return_lse: bool,
    clip: Clip | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All chunks under autograd, each recomputed in the backward.

    Without recomputation autograd would keep every gathered block: ``density * nq`` copies of K and V.
    """
    parts = [
        checkpoint(_attend_chunk, query, key, value, plan, chunk, scale, return_lse, clip, use_reentrant=False)
        for chunk in plan.chunks
    ]
    out = torch.cat([part[0] for part in parts])
    lse = torch.cat([part[1] for part in parts]) if return_lse else None
    if not any(chunk.count for chunk in plan.chunks):
        # Nothing is read, and nothing would lead back to the inputs, whose gradients are 0.
        everything = torch.ones((), dtype=torch.bool, device=query.device)
        zero = sum(x[:1].masked_fill(everything, 0).sum() for x in (query, key, value))
        out, lse = out + zero, None if lse is None else lse + zero
    return out, lse


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to_blocks(x: torch.Tensor, rows: torch.Tensor | None, count: int, block: int) -> torch.Tensor:
    """``[B, S, H, D]`` to contiguous, possibly permuted, zero-padded ``[B, H, count * block, D]``."""
    padding = count * block - x.shape[1]
    x = gather_rows(x, rows)
    return F.pad(x, (0, 0, 0, padding)) if padding else x.contiguous()


class _Plan:
    """The lists of a mask, flattened over batch and head, and the chunks that cover its query blocks.

    ``back`` says where in the chunks' order each query block is; None when that is its own place.
    """

    def __init__(
        self,
        mask: BlockMask,
        indices: torch.Tensor,
        counts: torch.Tensor,
        fulls: torch.Tensor,
        bits: torch.Tensor | None,
        keys: torch.Tensor | None,
        chunks: tuple[_Chunk, ...],
        back: torch.Tensor | None,
        heads: int,
    ) -> None:
        self.mask, self.heads = mask, heads
        self.indices, self.counts, self.fulls = indices, counts, fulls
        self.bits, self.keys, self.chunks, self.back = bits, keys, chunks, back

    @classmethod
    def build(
        cls,
        mask: BlockMask,
        batch: int,
        heads: int,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        block_bytes: int,
    ) -> _Plan:
        nq, nk = mask.num_blocks
        counts = mask.kv_num_blocks.expand(batch, heads, nq).reshape(-1).long()
        fulls = mask.kv_num_full.expand(batch, heads, nq).reshape(-1).long()
        slots = mask.kv_indices.shape[-1]
        indices = mask.kv_indices.expand(batch, heads, nq, slots).reshape(-1, slots)
        bits = None
        if mask.kv_bits is not None:
            bits = mask.kv_bits.expand(batch, heads, nq, slots).reshape(-1, slots)
        keys = None
        if key_mask is not None:
            keys = key_mask[:, None].expand(batch, heads, mask.kv_len)
            if rows is not None:
                keys = keys.gather(-1, rows.long().expand_as(keys))
            keys = F.pad(keys, (0, nk * mask.block_k - mask.kv_len)).reshape(-1, mask.block_k)

        masked = counts > fulls
        short = torch.zeros_like(masked)
        if keys is None and bits is None:
            # A single partial block that is the end of the sequence lies last in the list and can be cut.
            last = indices.gather(-1, (counts - 1).clamp_min(0)[:, None]).squeeze(-1)
            short = (counts - fulls == 1) & (last == nk - 1)
        kind = torch.where(short, 1, torch.where(masked, 2, 0))
        code = (kind * (nk + 1) + counts).cpu()
        sort = torch.sort(code, stable=True)
        budget = _CHUNK_BYTES_CPU if mask.kv_indices.device.type == "cpu" else _CHUNK_BYTES_GPU
        in_order = bool((code[1:] >= code[:-1]).all())
        chunks = tuple(
            _Chunk(
                sort.indices[begin:end].to(counts.device),
                slice(begin, end) if in_order else None,
                count,
                hidden,
                cut,
            )
            for begin, end, count, hidden, cut in _cut(sort.values, nk + 1, budget, block_bytes)
        )
        back = None
        if not in_order:
            back = torch.empty_like(sort.indices)
            back[sort.indices] = torch.arange(len(back))
            back = back.to(counts.device)
        return cls(mask, indices, counts, fulls, bits, keys, chunks, back, heads)

    def visible(self, chunk: _Chunk) -> torch.Tensor:
        """bool ``[n, 1 or block_q, count * block_k]``: the keys of a chunk that its queries see."""
        mask, ids = self.mask, chunk.row_ids
        nq, nk = mask.num_blocks
        slot = torch.arange(chunk.count, device=ids.device)
        listed = slot < self.counts[ids, None]
        blocks = torch.where(listed, self.indices[ids, : chunk.count].long(), 0)
        partial = listed & (slot >= self.fulls[ids, None])
        position = blocks[..., None] * mask.block_k + torch.arange(mask.block_k, device=ids.device)
        seen = listed[..., None] & (~partial[..., None] | (position < mask.kv_len))
        if self.keys is not None:
            keys = self.keys[(ids // nq * nk)[:, None] + blocks]
            seen = seen & (~partial[..., None] | keys)
        seen = seen[:, None]
        if self.bits is not None and mask.token_bits is not None and len(mask.token_bits):
            bit_rows = torch.where(partial, self.bits[ids, : chunk.count].long(), -1)
            words = mask.token_bits[bit_rows.clamp_min(0)]
            shift = torch.arange(32, device=ids.device, dtype=torch.int32)
            tokens = ((words[..., None] >> shift) & 1).bool().flatten(-2)
            tokens = tokens | (bit_rows < 0)[..., None, None]
            seen = seen & tokens.transpose(1, 2)
        return seen.flatten(-2)


def _cut(codes: torch.Tensor, base: int, budget: int, block_bytes: int) -> Iterator[tuple[int, int, int, bool, bool]]:
    """Cut sorted codes ``kind * base + count`` into ``(begin, end, count, masked, short)`` chunks."""
    values, lengths = torch.unique_consecutive(codes, return_counts=True)
    begin = end = 0
    merged: list[int] = []
    runs = list(zip(values.tolist(), lengths.tolist()))
    for position, (code, length) in enumerate(runs):
        end += length
        merged.append(code)
        kind, count = divmod(code, base)
        final = position + 1 == len(runs)
        # A count of 0 gathers nothing; merging it would only add masked work.
        if end - begin < _MIN_ROWS and count and not final and (runs[position + 1][0] // base == kind):
            continue
        uneven = len(merged) > 1
        step = max(1, budget // max(1, count * block_bytes))
        for start in range(begin, end, step):
            yield start, min(end, start + step), count, kind == 2 or uneven, kind == 1 and not uneven
        begin, merged = end, []


def _attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: _Plan,
    chunk: _Chunk,
    scale: float,
    return_lse: bool,
    clip: Clip | None,
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``out [n, block_q, D]`` and, on request, ``lse [n, block_q]`` of one chunk.

    ``buffers`` take the gathered keys and values where no gradient needs them.
    """
    mask = plan.mask
    nq, nk = mask.num_blocks
    ids, dim = chunk.row_ids, query.shape[-1]
    q = query.index_select(0, ids) if chunk.span is None else query[chunk.span]
    if chunk.count == 0:
        lse = q.new_full(q.shape[:2], float("-inf"), dtype=_lse_dtype(q)) if return_lse else None
        return torch.zeros_like(q), lse
    seen = plan.visible(chunk) if chunk.masked else None
    picked = plan.indices[ids, : chunk.count].long()
    if chunk.masked:
        # Shorter lists are filled up with a block that is read anyway: a NaN would come through a weight of 0.
        listed = torch.arange(chunk.count, device=ids.device) < plan.counts[ids, None]
        picked = torch.where(listed, picked, picked[:, :1])
    picked = (picked + (ids // nq * nk)[:, None]).reshape(-1)
    if buffers is None:
        k, v = key.index_select(0, picked), value.index_select(0, picked)
    else:
        k, v = (torch.index_select(x, 0, picked, out=b[: len(picked)]) for x, b in zip((key, value), buffers))
    k, v = k.view(len(ids), -1, dim), v.view(len(ids), -1, dim)
    if chunk.short:
        length = chunk.count * mask.block_k - (nk * mask.block_k - mask.kv_len)
        k, v = k[:, :length], v[:, :length]

    some = None
    if seen is not None:
        some = seen.any(-1, keepdim=True)
        # A row that sees nothing attends everywhere here, so that no NaN arises; it is zeroed below.
        seen = seen | ~some
    lse = None
    if return_lse and _gives_lse(q, k, v, clip):
        out, lse = _flash_on_cpu(q, k, v, seen, scale)
        lse = lse if some is None else lse.masked_fill(~some[..., 0], float("-inf"))
    elif return_lse:
        dtype = _lse_dtype(q)
        scores = torch.bmm(q.to(dtype), k.to(dtype).transpose(1, 2)) * scale
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = torch.exp(scores - lse)
        if clip is not None:
            count = k.shape[1] if seen is None else seen.sum(-1, keepdim=True)
            weights = clip.change(weights, ids // nq % plan.heads, count)
        out = torch.bmm(weights.to(v.dtype), v)
        lse = lse if some is None else lse.masked_fill(~some, float("-inf"))
        lse = lse.squeeze(-1)
    else:
        attn_mask = None if seen is None else seen[:, None].expand(-1, 1, q.shape[1], -1)
        out = F.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=attn_mask, scale=scale
        ).squeeze(1)
    return out if some is None else out.masked_fill(~some, 0), lse


def _gives_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, clip: Clip | None) -> bool:
    """Whether torch's flash attention of the CPU computes this: half the time of a product, a softmax and a product.

    Its logits of float16 are float16, and overflow.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    alike = q.dtype == k.dtype == v.dtype and q.dtype != torch.float16 and q.shape[-1] == v.shape[-1]
    return q.device.type == "cpu" and clip is None and not learns and alike


def _flash_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [n, block_q, D]`` and ``lse [n, block_q]``: the operator below torch's own call, which drops the latter."""
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))[:, None]
        mask = mask.expand(-1, 1, q.shape[1], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
    )
    return out[:, 0], lse[:, 0]
