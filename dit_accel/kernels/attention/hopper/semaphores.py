"""Semaphores of the Hopper kernel: counters in global memory by which programs wait for each other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def semaphore_add(semaphore, number):
    """Add to a counter in global memory what the calling warp has done; whoever awaits the sum sees it.

    A release only: what acquires empties the cache of the whole multiprocessor, masks of tokens and keys included.
    """
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred first;
        .reg .b32 lane;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first red.release.gpu.global.add.s32 [$1], $2;
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r",
        [semaphore.to(gl.int64), number],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def semaphore_reached(semaphore, number):
    """Whether a counter in global memory is at ``number``; if so, what was done before is seen, by TMA too."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred reached;
        .reg .b32 seen;
        ld.relaxed.gpu.global.s32 seen, [$1];
        setp.ge.s32 reached, seen, $2;
        selp.b32 $0, 1, 0, reached;
        @!reached bra not_yet;
        fence.acq_rel.gpu;
        fence.proxy.async.global;
        not_yet:
        }
        """,
        "=r,l,r",
        [semaphore.to(gl.int64), number],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def semaphore_wait(semaphore, number):
    """Wait until :func:`semaphore_reached`, without its fences in the loop: they empty the cache of other warps."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred again;
        .reg .b32 seen;
        look:
        ld.relaxed.gpu.global.s32 seen, [$1];
        setp.lt.s32 again, seen, $2;
        @again bra look;
        fence.acq_rel.gpu;
        fence.proxy.async.global;
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r",
        [semaphore.to(gl.int64), number],
        gl.int32,
        False,
        1,
    )
