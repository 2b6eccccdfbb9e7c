"""Store warps of the Hopper kernel: two that take outputs out and, in permuted calls, bring queries in.

A store waits until it has read its buffer, and a permuted row until memory has answered: TMA moves adjacent rows only.
Here both wait beside the consumers' arithmetic, and take none of the consumers' registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .rows import row_addresses
from .tile_scheduler import get_current_work, initial_work_tile, tile_block, tile_header

STORE_WARPS = gl.constexpr(2)
_CHUNK = gl.constexpr(8)  # rows that are under way at a time: these warps have few registers


@gluon.jit
def load_row_idx(tile, buffer, row_idx, nq, perm_at, q_len):
    """The rows in memory of a tile's 128 slots to shared memory; slots past the last one get row 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [STORE_WARPS], [0])
    for wg in gl.static_range(2):
        slot = tile_block(tile, nq) * 128 + wg * 64 + gl.arange(0, 64, layout=LAYOUT)
        row_idx.index(buffer + wg).store(gl.load(perm_at + slot, mask=slot < q_len, other=0))


@gluon.jit
def load_permuted_q(head, buffer, shared, tensors, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Both halves of a tile's queries into their buffers."""
    base = tensors.q_ptr + head * tensors.stride_qh
    for wg in range(2):
        for chunk in gl.static_range(64 // _CHUNK):
            at = row_addresses(
                base, shared.row_idx.index(buffer + wg), chunk, tensors.stride_qs, _CHUNK, HEAD_DIM, LAYOUT
            )
            async_copy.async_copy_global_to_shared(shared.q_smem.index(buffer + wg).slice(chunk * _CHUNK, _CHUNK), at)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    for wg in gl.static_range(2):
        mbarrier.arrive(shared.q_full.index(buffer + wg), count=1)


@gluon.jit
def store_o(
    tile,
    turn,
    out_desc,
    shared,
    sizes,
    tensors,
    HEAD_DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
    PERMUTED: gl.constexpr,
    QUANTIZED: gl.constexpr,
):
    """Both halves of a tile's output from shared to global memory, once the consumers have left them there."""
    head = (tile // sizes.nq).to(gl.int64)
    buffer = (turn % 2) * 2
    for wg in range(2):
        first_slot = tile_block(tile, sizes.nq) * 128 + wg * 64
        at = wg if QUANTIZED else buffer + wg
        mbarrier.wait(shared.o_full.index(at), (turn if QUANTIZED else turn // 2) & 1)
        if PERMUTED:
            for chunk in gl.static_range(64 // _CHUNK):
                slot = first_slot + chunk * _CHUNK + gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, LAYOUT))
                base = tensors.out_ptr + head * tensors.stride_oh
                to = row_addresses(
                    base, shared.row_idx.index(buffer + wg), chunk, tensors.stride_os, _CHUNK, HEAD_DIM, LAYOUT
                )
                rows = shared.o_smem.index(at).slice(chunk * _CHUNK, _CHUNK).load(LAYOUT)
                gl.store(to, rows, mask=(slot < tensors.q_len)[:, None])
        else:
            tma.async_copy_shared_to_global(
                out_desc, [first_slot, (head * HEAD_DIM).to(gl.int32)], shared.o_smem.index(at)
            )
    if not PERMUTED:
        tma.store_wait(pendings=0)
        if not QUANTIZED:
            for wg in gl.static_range(2):
                mbarrier.arrive(shared.q_empty.index(buffer + wg), count=1)


@gluon.jit
def store_loop(
    out_desc,
    shared,
    scheduler,
    lists,
    sizes,
    tensors,
    means,
    HEAD_DIM: gl.constexpr,
    PERMUTED: gl.constexpr,
    QUANTIZED: gl.constexpr,
    PAIRED: gl.constexpr,
    MEANS: gl.constexpr,
):
    """What goes in and out of every tile of this program that reads any block."""
    LANES: gl.constexpr = HEAD_DIM // 8  # that copy a row, 16 bytes each
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [STORE_WARPS, 1], [1, 0])
    turn = gl.to_tensor(0)
    tile, work_idx = initial_work_tile(scheduler, PERMUTED and not QUANTIZED)
    # The tile before, whose output is still to come; after the last tile one more round waits for it.
    before = gl.to_tensor(-1)
    while (tile < sizes.num_tiles) | (before >= 0):
        inside = tile < sizes.num_tiles
        _row, count, _full = tile_header(tile, sizes, lists, means, PAIRED, MEANS)
        if (count > 0) | (tile >= sizes.num_tiles):
            if PERMUTED:  # noqa: SIM102 - a compile-time condition around a run-time one
                if inside:
                    buffer = (turn % 2) * 2
                    head = (tile // sizes.nq).to(gl.int64)
                    load_row_idx(
                        tile,
                        buffer,
                        shared.row_idx,
                        sizes.nq,
                        lists.perm_ptr + head * tensors.perm_head_stride,
                        tensors.q_len,
                    )
                    if not QUANTIZED:
                        load_permuted_q(head, buffer, shared, tensors, HEAD_DIM, LAYOUT)
            if before >= 0:
                store_o(before, turn - 1, out_desc, shared, sizes, tensors, HEAD_DIM, LAYOUT, PERMUTED, QUANTIZED)
            if QUANTIZED:
                for wg in gl.static_range(2):
                    mbarrier.arrive(shared.o_empty.index(wg), count=1)
            before = gl.where(inside, tile, -1)
            turn += 1
        if inside:
            tile = get_current_work(scheduler, work_idx)
            work_idx += 1
