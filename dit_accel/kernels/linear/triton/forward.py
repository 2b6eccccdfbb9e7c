"""Triton forward of the linear branch: block states, their sums, and the output with projection and add.

See :mod:`dit_accel.kernels.linear.api` for the form and for why the sums are a matrix product. Heads are
taken a few at a time, so that the states stay in the L2 cache and the extra memory stays under
``STATE_SHARE`` of q, k, v and out, or under ``STATE_BYTES`` in a small call. A state row holds D x D values of
phi(K)^T V and then D of sum phi(K). The projection acts on the values as they are read, so that the output kernel
needs one product only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ...common.capability import is_amd
from ...common.compiled import KeptKernel
from ...common.launch import (
    DOT_PRECISION,
    ceil_div,
    contiguous_key_mask,
    lead_strides,
    or_stand_in,
    padded_head_dim,
    register_limit,
)
from ...mask.block_mask import BlockMask
from ..shared import SharedSums
from .forward_kernels import (
    linear_combine_kernel,
    linear_out_fwd_kernel,
    linear_state_fwd_kernel,
    marginal_map_kernel,
)

STATE_SHARE = 0.14
"""Forward states may take this share of the bytes of q, k, v and out (at least one head's)."""

STATE_BYTES = 32 << 20
"""States that are no matter whatever the share: many short sequences run in few launches."""

SPLITS = 264
"""Programs that share a sum over all tokens, all heads together: two per multiprocessor of an H200."""

STATE_TILES, STATE_STAGES = 4, 3
"""Key tiles of one program that makes block states, and its pipeline depth (one less with a projection, whose
weight takes that stage's shared memory)."""

OUT_PER_BLOCK, OUT_ALL = (64, 4, 2), (32, 4, 3)
"""Query rows of one step of the output kernel, its warps and its pipeline depth: with a state per query
block, and with one state for all."""


@dataclass(frozen=True)
class Shape:
    """Sizes and launch constants that the kernels of one call share."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    dim: int
    block_q: int
    block_k: int
    dtype: torch.dtype

    @property
    def state_width(self) -> int:
        """Elements of a state row."""
        return self.dim * self.dim + self.dim

    @property
    def tile_k(self) -> int:
        """Keys that a kernel reads at a time."""
        return min(self.block_k, 64)

    @property
    def constants(self) -> dict[str, int | str]:
        """Constexprs of every kernel with matrix products."""
        return {"DIM": self.dim, "DIM_PAD": padded_head_dim(self.dim), "PRECISION": DOT_PRECISION}

    def chunks(self, share: float, buffers: int) -> Iterator[tuple[slice, slice]]:
        """Batch and head ranges such that ``buffers`` pairs of states fit the memory share.

        A range of several batches holds all heads, as the kernels number them.
        """
        rows = ceil_div(self.q_len, self.block_q) + ceil_div(self.kv_len, self.block_k)
        one = rows * self.state_width * buffers
        call = 2 * (self.q_len + self.kv_len) * self.heads * self.dim * self.batch
        fitting = max(1, int(max(share * call, STATE_BYTES / self.dtype.itemsize) / one))
        # Equal chunks: the same memory peak, and no small last launch.
        step = ceil_div(self.heads, ceil_div(self.heads, min(self.heads, fitting)))
        batches = max(1, fitting // self.heads) if step == self.heads else 1
        batches = ceil_div(self.batch, ceil_div(self.batch, min(self.batch, batches)))
        for b in range(0, self.batch, batches):
            for start in range(0, self.heads, step):
                yield slice(b, min(b + batches, self.batch)), slice(start, min(start + step, self.heads))


_MAP, _STATE, _COMBINE, _OUT = (
    KeptKernel(kernel)
    for kernel in (marginal_map_kernel, linear_state_fwd_kernel, linear_combine_kernel, linear_out_fwd_kernel)
)


def shape_of(q: torch.Tensor, k: torch.Tensor, critical: BlockMask | None) -> Shape:
    """The sizes of a call."""
    block_q, block_k = (128, 64) if critical is None else (critical.block_q, critical.block_k)
    batch, q_len, heads, dim = q.shape
    return Shape(batch, q_len, k.shape[1], heads, dim, block_q, block_k, q.dtype)


def chunks_of(shape: Shape, share: float, buffers: int, shared: SharedSums | None) -> Iterator[tuple[slice, slice]]:
    """:meth:`Shape.chunks`, the same in all processes that share a sequence: each exchanges states chunk by chunk."""
    if shared is None:
        return shape.chunks(share, buffers)
    return replace(shape, q_len=shared.tokens, kv_len=shared.tokens).chunks(share / shared.processes, buffers)


def scaled_map(critical: BlockMask, negligible: BlockMask | None, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """:func:`marginal_map` with ``scale`` for 1: ``[B|1, H|1, nq, nk]``."""
    masks = [critical] if negligible is None else [critical, negligible]
    nq, nk = critical.num_blocks
    lead = [max(m.kv_num_blocks.shape[d] for m in masks) for d in (0, 1)]
    out = torch.full((*lead, nq, nk), scale, dtype=dtype, device=critical.kv_num_blocks.device)
    for mask in masks:
        num = mask.kv_num_blocks.expand(*lead, nq).contiguous()
        indices = mask.kv_indices.expand(*lead, nq, -1).contiguous()
        with torch.cuda.device_of(out):
            _MAP[(num.numel(),)](num, indices, out, indices.shape[-1], nk, CHUNK=128, num_warps=1)
    return out


def map_scale(shape: Shape, shared: SharedSums | None) -> float:
    """A power of two near 1 / nk: keeps sums of states in float16's range, and cancels in the quotient."""
    nk = ceil_div(shape.kv_len if shared is None else shared.tokens, shape.block_k)
    return 2.0 ** -max(0, nk.bit_length() - 1)


def split_precision() -> str:
    """Products of parts, on matrix units, that keep 21 bits or more of a state that is rounded to 11 or 8.

    Exact float32 goes without them and spills 5 KB a thread at head dim 128. AMD's compilers know no parts in TF32.
    """
    return "bf16x6" if is_amd() else "tf32x3"


def registers(shape: Shape) -> int | None:
    """A register limit that lets two programs share a multiprocessor (checked to spill nothing)."""
    return 128 if shape.dim > 64 and shape.dtype != torch.float32 else None


def launch_states(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    states: torch.Tensor,
    shape: Shape,
    kind: str,
    *,
    group_tiles: int,
    per_block: bool,
    batch0: int,
    head0: int,
) -> None:
    """Fill ``states`` [heads of the launch, states, D * D + D], from ``batch0`` and ``head0`` on."""
    heads = min(shape.heads, states.shape[0])
    groups = ceil_div(ceil_div(shape.kv_len, shape.tile_k), group_tiles)
    with torch.cuda.device_of(k):
        _STATE[(states.shape[0] * groups,)](
            k,
            v,
            or_stand_in(rows, k),
            or_stand_in(key_mask, k),
            or_stand_in(weight, k),
            states,
            shape.kv_len,
            heads,
            groups,
            group_tiles,
            states.shape[1],
            batch0,
            head0,
            *k.stride(),
            *v.stride(),
            *lead_strides(rows),
            shape.kv_len,
            0 if weight is None or weight.dim() == 2 else weight.stride(0),
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            PROJECT=weight is not None,
            PER_BLOCK=per_block,
            TILES_PER_STATE=shape.block_k // shape.tile_k,
            KIND=kind,
            TILE=shape.tile_k,
            num_warps=8 if shape.dim > 64 else 4,
            num_stages=STATE_STAGES - (weight is not None),
            **register_limit(registers(shape)),
            **shape.constants,
        )


def launch_block_states(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    states: torch.Tensor,
    shape: Shape,
    kind: str,
    batch0: int,
    head0: int,
) -> None:
    """One state per key block."""
    group = STATE_TILES * (shape.block_k // shape.tile_k)
    launch_states(
        k, v, rows, key_mask, weight, states, shape, kind,
        group_tiles=group, per_block=True, batch0=batch0, head0=head0,
    )  # fmt: skip


def all_states(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    shape: Shape,
    kind: str,
    dtype: torch.dtype | None = None,
    shared: SharedSums | None = None,
) -> torch.Tensor:
    """The mean state over all tokens, ``[B * H, 1, D * D + D]`` in ``dtype`` (the input's if None)."""
    total = shape.batch * shape.heads
    tiles = ceil_div(shape.kv_len, shape.tile_k)
    group = ceil_div(tiles, max(1, SPLITS // total))
    splits = ceil_div(tiles, group)
    partial = torch.empty(total, splits, shape.state_width, dtype=torch.float32, device=k.device)
    launch_states(
        k, v, None, key_mask, None, partial, shape, kind,
        group_tiles=group, per_block=False, batch0=0, head0=0,
    )  # fmt: skip
    if shared is None:
        return combine(partial, weight, shape, 1.0 / shape.kv_len, dtype)
    own = combine(partial, None, shape, 1.0 / shared.tokens, torch.float32)
    return combine(shared.summed(own), weight, shape, 1.0, dtype)


def combine(
    partial: torch.Tensor,
    weight: torch.Tensor | None,
    shape: Shape,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``scale`` times the sum of partial states [B * H, splits, ...], projected, in ``dtype`` (the input's if None)."""
    dtype = shape.dtype if dtype is None else dtype
    states = torch.empty(partial.shape[0], 1, shape.state_width, dtype=dtype, device=partial.device)
    with torch.cuda.device_of(partial):
        _COMBINE[(partial.shape[0], ceil_div(shape.dim, 16))](
            partial,
            or_stand_in(weight, partial),
            states,
            shape.heads,
            partial.shape[1],
            scale,
            0 if weight is None or weight.dim() == 2 else weight.stride(0),
            PROJECT=weight is not None,
            ROWS=16,
            DIM=shape.dim,
            DIM_PAD=padded_head_dim(shape.dim),
            PRECISION=DOT_PRECISION if shape.dtype == torch.float32 else split_precision(),
            num_warps=8 if weight is not None else 4,
        )
    return states


def launch_out(
    q: torch.Tensor,
    rows: torch.Tensor | None,
    states: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    shape: Shape,
    kind: str,
    eps: float,
    *,
    group_tokens: int,
    batch0: int = 0,
    head0: int = 0,
) -> None:
    """Output of the queries of every head of ``states`` [heads of the launch, groups or 1, D * D + D].

    ``added``, which may be ``out`` itself, is added to it.
    """
    groups = ceil_div(shape.q_len, group_tokens)
    tile, warps, stages = OUT_ALL if states.shape[1] == 1 else OUT_PER_BLOCK
    with torch.cuda.device_of(q):
        _OUT[(states.shape[0] * groups,)](
            q,
            or_stand_in(rows, q),
            states,
            or_stand_in(bias, q),
            or_stand_in(added, out),
            out,
            shape.q_len,
            min(shape.heads, states.shape[0]),
            groups,
            group_tokens,
            batch0,
            head0,
            eps,
            *q.stride(),
            *or_stand_in(added, out).stride(),
            *out.stride(),
            *lead_strides(rows),
            states.stride(0),
            0 if states.shape[1] == 1 else shape.state_width,
            0 if bias is None or bias.dim() == 1 else bias.stride(0),
            HAS_ROWS=rows is not None,
            HAS_BIAS=bias is not None,
            ADD=added is not None,
            KIND=kind,
            TILE=min(group_tokens, tile),
            num_warps=warps,
            num_stages=stages,
            **shape.constants,
        )


def contiguous_lists(
    k: torch.Tensor, rows: torch.Tensor | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The permutation, and the key mask ``[B|1, Sk]`` for all of k's batch, as the kernels read them."""
    return None if rows is None else rows.contiguous(), contiguous_key_mask(key_mask, *k.shape[:2])


def linear_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    negligible: BlockMask | None,
    kind: str,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    eps: float,
    *,
    added: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    shared: SharedSums | None = None,
) -> torch.Tensor:
    """Forward on checked arguments: projected by ``weight``, onto ``added``, into ``out`` (a new tensor if None).

    ``mean`` is the unprojected :func:`all_states` in float32, where the caller has it.
    """
    shape = shape_of(q, k, critical)
    rows, key_mask = contiguous_lists(k, rows, key_mask)
    weight = None if weight is None else weight.to(q.dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype if added is None else added.dtype, device=q.device)
    if critical is None:
        # The sum over tokens is scaled to a mean, so eps is scaled with it.
        tokens = shape.kv_len if shared is None else shared.tokens
        if mean is None:
            states = all_states(k, v, key_mask, weight, shape, kind, shared=shared)
        else:
            states = combine(mean, weight, shape)
        group = ceil_div(shape.q_len, max(1, 2 * SPLITS // states.shape[0]))
        group = ceil_div(group, 64) * 64
        launch_out(q, rows, states, out, bias, added, shape, kind, eps / tokens, group_tokens=group)
        return out
    nq, nk = critical.num_blocks
    scale = map_scale(shape, shared)
    marginal = scaled_map(critical, negligible, q.dtype, scale).expand(shape.batch, shape.heads, nq, nk)
    states = sums = None

    def finish(total: torch.Tensor, b: int, head: int) -> None:
        launch_out(
            q, rows, total, out, bias, added, shape, kind, eps * scale,
            group_tokens=shape.block_q, batch0=b, head0=head,
        )  # fmt: skip

    # Sums of some heads are under way while the states of the next are made: two chunks at a time are alive.
    under_way: tuple[Callable[[], torch.Tensor], int, int] | None = None
    for batches, heads in chunks_of(shape, STATE_SHARE, 1 if shared is None else 2, shared):
        part = marginal[batches, heads].flatten(0, 1)
        if states is None or states.shape[0] != part.shape[0]:
            states = torch.empty(part.shape[0], nk, shape.state_width, dtype=q.dtype, device=q.device)
        if sums is None or shared is not None or sums.shape[0] != part.shape[0]:
            sums = torch.empty(part.shape[0], nq, shape.state_width, dtype=q.dtype, device=q.device)
        b, head = batches.start, heads.start
        launch_block_states(k, v, rows, key_mask, weight, states, shape, kind, b, head)
        torch.bmm(part, states, out=sums)
        if shared is None:
            finish(sums, b, head)
            continue
        begun = shared.begin(sums)
        if under_way is not None:
            finish(under_way[0](), *under_way[1:])
        under_way = begun, b, head
    if under_way is not None:
        finish(under_way[0](), *under_way[1:])
    return out
