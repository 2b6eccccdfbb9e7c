"""A warp of the Hopper kernel that puts keys and values of a permuted call in order, some heads ahead.

TMA moves adjacent rows only. A copy made beforehand costs its time and the memory of all heads; gathering the rows of
every listed block reads each of them once a query block, and takes four warps. Here the rows of a head are moved once,
while the heads before are attended, into a circular buffer of a few heads, the ring.

Programs on other multiprocessors read what this warp has written, and it writes over what they have read. Both are
counted in global memory, a head at a time: ``full_ptr`` counts blocks that lie in the ring, ``empty_ptr`` tiles that
have loaded all of theirs. Nobody waits for work that a program has not taken yet: blocks and tiles are both taken in
order, by programs that run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.language import debug_barrier

from .rows import row_addresses
from .semaphores import semaphore_add, semaphore_wait

_CHUNK = gl.constexpr(8)  # rows whose row indices are read at a time: the warp has few registers


@gluon.jit
def kv_blocks_of_head(kv_len, BLOCK_K: gl.constexpr):
    """Blocks of a head's keys and values."""
    return (kv_len + BLOCK_K - 1) // BLOCK_K * 2


@gluon.jit
def load_block_row_idx(kv_block, end, kv_blocks, row_idx, perm_ptr, perm_head_stride, kv_len, BLOCK_K: gl.constexpr):
    """The rows in memory of a block's slots to shared memory; slots past the last one get row 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([BLOCK_K // 32], [32], [1], [0])
    slot = kv_block % kv_blocks // 2 * BLOCK_K + gl.arange(0, BLOCK_K, layout=LAYOUT)
    at = perm_ptr + (kv_block // kv_blocks).to(gl.int64) * perm_head_stride + slot
    row_idx.store(gl.load(at, mask=(slot < kv_len) & (kv_block < end), other=0))


@gluon.jit
def finish_stores():
    """Wait until what the calling thread has stored by TMA is in memory; Triton waits until it has been read only."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def permute_kv(
    descriptors, permute, lists, sizes, tensors, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, PERMUTE_KV: gl.constexpr
):
    """Move the keys and values of all heads, together with the other programs, into the ring."""
    if PERMUTE_KV:
        LANES: gl.constexpr = HEAD_DIM // 8  # that move a row, 16 bytes each
        ROWS: gl.constexpr = _CHUNK * LANES // 32  # of a chunk, in a thread
        LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS, 8], [32 // LANES, LANES], [1, 1], [1, 0])
        kv_blocks = kv_blocks_of_head(tensors.kv_len, BLOCK_K)
        end = sizes.num_tiles // sizes.nq * kv_blocks
        turn = gl.to_tensor(0)
        # The last head whose place in the ring is known to be free.
        free = gl.to_tensor(sizes.ring - 1)
        kv_block = gl.atomic_add(permute.claimed_ptr, 1, sem="relaxed")
        load_block_row_idx(
            kv_block,
            end,
            kv_blocks,
            permute.row_idx.index(0),
            lists.perm_ptr,
            tensors.perm_head_stride,
            tensors.kv_len,
            BLOCK_K,
        )
        while kv_block < end:
            head = kv_block // kv_blocks
            values = kv_block % 2 == 1
            base = tensors.k_ptr + head.to(gl.int64) * tensors.stride_kh
            stride = tensors.stride_ks
            if values:
                base = tensors.v_ptr + head.to(gl.int64) * tensors.stride_vh
                stride = tensors.stride_vs
            for chunk in gl.static_range(BLOCK_K // _CHUNK):
                at = row_addresses(base, permute.row_idx.index(turn), chunk, stride, _CHUNK, HEAD_DIM, LAYOUT)
                async_copy.async_copy_global_to_shared(permute.tile.slice(chunk * _CHUNK, _CHUNK), at)
            async_copy.commit_group()
            following = gl.atomic_add(permute.claimed_ptr, 1, sem="relaxed")
            turn = turn ^ 1
            load_block_row_idx(
                following,
                end,
                kv_blocks,
                permute.row_idx.index(turn),
                lists.perm_ptr,
                tensors.perm_head_stride,
                tensors.kv_len,
                BLOCK_K,
            )
            async_copy.wait_group(0)
            if head > free:
                semaphore_wait(permute.empty_ptr + head - sizes.ring, sizes.nq)
                free = head
            fence_async_shared()
            debug_barrier()
            slot = kv_block % kv_blocks // 2 * BLOCK_K
            column = head % sizes.ring * HEAD_DIM
            if values:
                tma.async_copy_shared_to_global(descriptors.v, [slot, column], permute.tile)
            else:
                tma.async_copy_shared_to_global(descriptors.k, [slot, column], permute.tile)
            finish_stores()
            semaphore_add(permute.full_ptr + head, 1)
            kv_block = following
