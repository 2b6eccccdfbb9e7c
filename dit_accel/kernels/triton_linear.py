"""Triton forward of the linear branch: block states, and the output with projection and add.

See :mod:`dit_accel.kernels.linear_branch` for the form and for why the sums are a matrix product. Heads are
taken a few at a time, so that the states stay in the L2 cache and the extra memory stays under
``STATE_SHARE`` of q, k, v and out. A state row holds D x D values of phi(K)^T V and then D of sum phi(K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .block_mask import BlockMask
from .triton_pooling import lead_strides

STATE_SHARE = 0.13
"""States may take this share of the bytes of q, k, v and out (at least one head's)."""

SPLITS = 132
"""Programs that share the sum over all tokens, all heads of a launch together: one per multiprocessor."""


@triton.jit
def feature_map(x, in_d, KIND: tl.constexpr):
    """phi of float32 rows [T, DIM_PAD]; 0 in the padding of the head dim."""
    if KIND == "softmax":
        x = tl.where(in_d[None, :], x, float("-inf"))
        e = tl.exp(x - tl.max(x, 1)[:, None])
        phi = e / tl.sum(e, 1)[:, None]
    elif KIND == "elu":
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        phi = tl.where(in_d[None, :], phi, 0.0)
    else:
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def slot_rows(rows_ptr, slot, valid, HAS_ROWS: tl.constexpr):
    """Original rows of slots."""
    row = slot
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot, mask=valid, other=0)
    return row


@triton.jit
def linear_state_fwd_kernel(
    k_ptr,
    v_ptr,
    rows_ptr,
    mask_ptr,
    state_ptr,
    seq,
    heads,
    groups,
    group_tokens,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state of ``group_tokens`` tokens: a block's, or a share of all tokens'."""
    pid = tl.program_id(0)
    h = pid % heads
    g = (pid // heads) % groups
    b = pid // (heads * groups)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    rows_ptr += b * stride_rb + h * stride_rh
    first = g * group_tokens
    end = tl.minimum(first + group_tokens, seq)
    b_h = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
    b_z = tl.zeros([DIM_PAD], tl.float32)
    for start in range(first, end, TILE):
        slot = start + tl.arange(0, TILE)
        valid = slot < end
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
        row = row.to(tl.int64)[:, None]
        ok = valid[:, None] & in_d[None, :]
        b_k = tl.load(k_ptr + row * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0)
        b_v = tl.load(v_ptr + row * stride_vs + o_d[None, :] * stride_vd, mask=ok, other=0.0)
        phi = tl.where(valid[:, None], feature_map(b_k.to(tl.float32), in_d, KIND), 0.0).to(b_v.dtype)
        b_h += tl.dot(tl.trans(phi), b_v, input_precision=PRECISION)
        b_z += tl.sum(phi.to(tl.float32), 0)
    p_state = state_ptr + ((b.to(tl.int64) * heads + h) * groups + g) * (DIM * DIM + DIM)
    ok_h = in_d[:, None] & in_d[None, :]
    out_dtype: tl.constexpr = state_ptr.dtype.element_ty
    tl.store(p_state + o_d[:, None] * DIM + o_d[None, :], b_h.to(out_dtype), mask=ok_h)
    tl.store(p_state + DIM * DIM + o_d, b_z.to(out_dtype), mask=in_d)


@triton.jit
def linear_out_fwd_kernel(
    q_ptr,
    rows_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    seq,
    heads,
    tiles,
    eps,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_rb,
    stride_rh,
    stride_state,
    stride_state_i,
    stride_wh,
    stride_bh,
    HAS_ROWS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi(q) H / (phi(q) . Z + eps) of one tile of queries; PROJECT also projects and adds to ``out``."""
    pid = tl.program_id(0)
    h = pid % heads
    t = (pid // heads) % tiles
    b = pid // (heads * tiles)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    slot = t * TILE + tl.arange(0, TILE)
    valid = slot < seq
    row = slot_rows(rows_ptr + b * stride_rb + h * stride_rh, slot, valid, HAS_ROWS).to(tl.int64)[:, None]
    ok = valid[:, None] & in_d[None, :]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    out_ptr += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    state_ptr += (b.to(tl.int64) * heads + h) * stride_state + (t // TILES_PER_BLOCK) * stride_state_i
    b_q = tl.load(q_ptr + row * stride_qs + o_d[None, :] * stride_qd, mask=ok, other=0.0)
    b_h = tl.load(state_ptr + o_d[:, None] * DIM + o_d[None, :], mask=ok_h, other=0.0)
    b_z = tl.load(state_ptr + DIM * DIM + o_d, mask=in_d, other=0.0).to(tl.float32)
    phi = feature_map(b_q.to(tl.float32), in_d, KIND).to(b_h.dtype)
    den = tl.sum(phi.to(tl.float32) * b_z[None, :], 1) + eps
    inverse = tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)
    b_o = tl.dot(phi, b_h, input_precision=PRECISION) * inverse[:, None]
    p_out = out_ptr + row * stride_os + o_d[None, :] * stride_od
    if PROJECT:
        b_w = tl.load(weight_ptr + h * stride_wh + o_d[None, :] * DIM + o_d[:, None], mask=ok_h, other=0.0)
        b_o = tl.dot(b_o.to(b_w.dtype), b_w, input_precision=PRECISION)
        if HAS_BIAS:
            b_o += tl.load(bias_ptr + h * stride_bh + o_d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        b_o += tl.load(p_out, mask=ok, other=0.0).to(tl.float32)
    tl.store(p_out, b_o.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def marginal_map_kernel(num_ptr, indices_ptr, map_ptr, width, nk, CHUNK: tl.constexpr):
    """Zero the listed blocks of one row of the map."""
    pid = tl.program_id(0).to(tl.int64)
    count = tl.load(num_ptr + pid)
    for start in range(0, count, CHUNK):
        o = start + tl.arange(0, CHUNK)
        j = tl.load(indices_ptr + pid * width + o, mask=o < count, other=0)
        tl.store(map_ptr + pid * nk + j, tl.zeros([CHUNK], map_ptr.dtype.element_ty), mask=o < count)


@dataclass(frozen=True)
class Shape:
    """Sizes and launch constants that the kernels of one call share."""

    dim: int
    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    dtype: torch.dtype

    @property
    def state_width(self) -> int:
        """Elements of a state row."""
        return self.dim * self.dim + self.dim

    @property
    def constants(self) -> dict[str, int | str]:
        """Constexprs of every kernel."""
        precision = "ieee" if self.dtype == torch.float32 else "tf32"
        return {"DIM": self.dim, "DIM_PAD": max(16, triton.next_power_of_2(self.dim)), "PRECISION": precision}


def shape_of(q: torch.Tensor, critical: BlockMask | None) -> Shape:
    """Check what the kernels can do and pick tiles."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32 for the Triton kernels, got {q.dtype}.")
    if q.shape[-1] > 128:
        raise ValueError(f"Head dim must be at most 128 for the linear branch's kernels, got {q.shape[-1]}.")
    block_q, block_k = (128, 64) if critical is None else (critical.block_q, critical.block_k)
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 16 or block & (block - 1):
            raise ValueError(f"{name} must be a power of two from 16 for the Triton kernels, got {block}.")
    return Shape(q.shape[-1], block_q, block_k, min(block_q, 128), min(block_k, 64), q.dtype)


def scaled_map(
    critical: BlockMask, negligible: BlockMask | None, dtype: torch.dtype, scale: float
) -> torch.Tensor:
    """:func:`marginal_map` with ``scale`` for 1: ``[B|1, H|1, nq, nk]``."""
    masks = [critical] if negligible is None else [critical, negligible]
    nq, nk = critical.num_blocks
    lead = [max(m.kv_num_blocks.shape[d] for m in masks) for d in (0, 1)]
    out = torch.full((*lead, nq, nk), scale, dtype=dtype, device=critical.kv_num_blocks.device)
    for mask in masks:
        num = mask.kv_num_blocks.expand(*lead, nq).contiguous()
        indices = mask.kv_indices.expand(*lead, nq, -1).contiguous()
        with torch.cuda.device_of(out):
            marginal_map_kernel[(num.numel(),)](
                num, indices, out, indices.shape[-1], nk, CHUNK=128, num_warps=1
            )
    return out


def head_view(x: torch.Tensor | None, b: int, heads: slice, head_dim: int) -> torch.Tensor | None:
    """One batch entry and some heads of a tensor whose batch and heads may be broadcast."""
    if x is None:
        return None
    x = x[:1] if x.shape[0] == 1 else x[b : b + 1]
    return x if x.shape[head_dim] == 1 else x.narrow(head_dim, heads.start, heads.stop - heads.start)


def head_chunks(q: torch.Tensor, k: torch.Tensor, shape: Shape, buffers: int) -> Iterator[tuple[int, slice]]:
    """Batch index and range of heads whose states (``buffers`` pairs of them) fit the memory share."""
    batch, q_len, heads, _ = q.shape
    rows = triton.cdiv(q_len, shape.block_q) + triton.cdiv(k.shape[1], shape.block_k)
    one = rows * shape.state_width * q.element_size() * buffers
    call = 2 * (q.numel() + k.numel()) * q.element_size()
    step = min(heads, max(1, int(STATE_SHARE * call / one)))
    for b in range(batch):
        for start in range(0, heads, step):
            yield b, slice(start, min(start + step, heads))


def launch_states(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    shape: Shape,
    kind: str,
    group_tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """States of all groups of ``group_tokens`` tokens: ``[B, H, groups, D * D + D]``."""
    batch, seq, heads, _ = k.shape
    groups = triton.cdiv(seq, group_tokens)
    states = torch.empty(batch, heads, groups, shape.state_width, dtype=dtype, device=k.device)
    with torch.cuda.device_of(k):
        linear_state_fwd_kernel[(batch * heads * groups,)](
            k,
            v,
            rows if rows is not None else k,
            key_mask if key_mask is not None else k,
            states,
            seq,
            heads,
            groups,
            group_tokens,
            *k.stride(),
            *v.stride(),
            *lead_strides(rows),
            *lead_strides(key_mask)[:1],
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            KIND=kind,
            TILE=shape.tile_k,
            num_warps=8 if shape.dim > 64 else 4,
            **shape.constants,
        )
    return states


def all_states(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    shape: Shape,
    kind: str,
) -> torch.Tensor:
    """The mean state over all tokens, ``[B, H, 1, D * D + D]`` in the input's dtype."""
    batch, seq, heads, _ = k.shape
    splits = max(1, SPLITS // (batch * heads))
    group = triton.cdiv(triton.cdiv(seq, splits), shape.tile_k) * shape.tile_k
    partial = launch_states(k, v, None, key_mask, shape, kind, group, torch.float32)
    return (partial.sum(2, keepdim=True) / seq).to(shape.dtype)


def map_scale(nk: int) -> float:
    """A power of two near 1 / nk: keeps sums of states in float16's range, and cancels in the quotient."""
    return 2.0 ** -max(0, nk.bit_length() - 1)


def launch_out(
    q: torch.Tensor,
    rows: torch.Tensor | None,
    states: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shape: Shape,
    kind: str,
    eps: float,
) -> None:
    """Output of all query tiles from ``states`` [B, H, nq or 1, D * D + D]."""
    batch, seq, heads, _ = q.shape
    tiles = triton.cdiv(seq, shape.tile_q)
    with torch.cuda.device_of(q):
        linear_out_fwd_kernel[(batch * heads * tiles,)](
            q,
            rows if rows is not None else q,
            states,
            weight if weight is not None else q,
            bias if bias is not None else q,
            out,
            seq,
            heads,
            tiles,
            eps,
            *q.stride(),
            *out.stride(),
            *lead_strides(rows),
            states.shape[2] * shape.state_width,
            0 if states.shape[2] == 1 else shape.state_width,
            0 if weight is None or weight.dim() == 2 else weight.stride(0),
            0 if bias is None or bias.dim() == 1 else bias.stride(0),
            HAS_ROWS=rows is not None,
            PROJECT=weight is not None,
            HAS_BIAS=bias is not None,
            KIND=kind,
            TILES_PER_BLOCK=shape.block_q // shape.tile_q,
            TILE=shape.tile_q,
            num_warps=8 if shape.dim > 64 else 4,
            **shape.constants,
        )


def linear_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    negligible: BlockMask | None,
    kind: str,
    rows: torch.Tensor | None,
    k_rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward on checked arguments; with ``weight`` it projects and adds to ``out``."""
    shape = shape_of(q, critical)
    rows = None if rows is None else rows.contiguous()
    k_rows = None if k_rows is None else k_rows.contiguous()
    key_mask = None if key_mask is None else key_mask.expand(k.shape[:2]).contiguous()
    weight = None if weight is None else weight.to(q.dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if critical is None:
        # The sum over tokens is scaled to a mean, so eps is scaled with it.
        states = all_states(k, v, key_mask, shape, kind)
        launch_out(q, rows, states, out, weight, bias, shape, kind, eps / k.shape[1])
        return out
    scale = map_scale(critical.num_blocks[1])
    marginal = scaled_map(critical, negligible, q.dtype, scale)
    for b, heads in head_chunks(q, k, shape, 1):
        q_h, k_h, v_h, out_h = (x[b : b + 1, :, heads] for x in (q, k, v, out))
        states = launch_states(
            k_h, v_h, head_view(k_rows, b, heads, 1), None if key_mask is None else key_mask[b : b + 1],
            shape, kind, shape.block_k, q.dtype,
        )  # fmt: skip
        sums = torch.matmul(head_view(marginal, b, heads, 1), states)
        weight_h = weight if weight is None or weight.dim() == 2 else weight[heads]
        bias_h = bias if bias is None or bias.dim() == 1 else bias[heads]
        launch_out(q_h, head_view(rows, b, heads, 1), sums, out_h, weight_h, bias_h, shape, kind, eps * scale)
    return out
