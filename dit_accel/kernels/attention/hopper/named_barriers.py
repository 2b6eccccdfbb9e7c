"""Named barriers of the Hopper kernel: buffers released to the producer, and the consumers' turns.

Numbers are those of ``bar.sync`` and ``bar.arrive``; FlashAttention keeps such a list in ``named_barrier.py``.

A warp that has only read says so for itself and goes on; at a barrier in shared memory, which Triton has, its whole
warpgroup would meet before every arrival. Copies arrive at those.

At each of these barriers a warp arrives again only after the other side has passed it, since it needs what that side
does next. What was arrived at last is passed at the end: :func:`producer_tail`, and a last turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A program has 16.
#   0 to 5: Triton's, one for each kind of warps, and one to start them
V_EMPTY = gl.constexpr(6)  # 6 to 13: a stage's values, and the next keys, have been read
K_EMPTY = gl.constexpr(12)  # 12 and 13: a stage's keys have been read; with two stages, which have 6 and 7 for values
WARP_SCHEDULER = gl.constexpr(14)  # 14 and 15: the turn of the first and of the second consumer (ping-pong)

# Threads that meet at a barrier.
CONSUMER_THREADS = gl.constexpr(256)
CONSUMER_AND_PRODUCER_THREADS = gl.constexpr(288)
OWNER_AND_PRODUCER_THREADS = gl.constexpr(160)

# In a pair of lists a consumer's next block may be two steps later, and until then it needs the values of this one.
PAIR_LAG = gl.constexpr(2)


@gluon.jit
def _arrive(barrier, threads):
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [barrier, threads], gl.int32, False, 1)


@gluon.jit
def arrive_in_place(barrier, threads, length):
    """:func:`_arrive` in a loop that runs once, which only the assembler does not know: ``length`` is not negative.

    Without a branch it puts the arrival behind all exponentials of the block. Two arrivals in a row take two lengths:
    what one loop has shown of its own the assembler knows in the next.
    """
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred again;
        here:
        bar.arrive $1, $2;
        setp.lt.s32 again, $3, 0;
        @again bra.uni here;
        mov.b32 $0, 0;
        }
        """,
        "=r,r,r,r",
        [barrier, threads, length],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def _sync(barrier, threads):
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [barrier, threads], gl.int32, False, 1)


@gluon.jit
def warp_scheduler_barrier_arrive(wg, length):
    """A consumer lets the other one issue its products."""
    arrive_in_place(WARP_SCHEDULER + 1 - wg, CONSUMER_THREADS, length)


@gluon.jit
def warp_scheduler_barrier_sync(wg):
    """A consumer waits for the other one to pass the turn."""
    _sync(WARP_SCHEDULER + wg, CONSUMER_THREADS)


@gluon.jit
def consumer_release_k(stage, length, STAGES: gl.constexpr):
    """A consumer has read a stage's keys. With more than two stages they go back with the values before them."""
    if STAGES == 2:
        arrive_in_place(K_EMPTY + stage, CONSUMER_AND_PRODUCER_THREADS, length)


@gluon.jit
def consumer_release_v(stage, STAGES: gl.constexpr):
    """A consumer has read a stage's keys and the values of the step before."""
    gl.static_assert(STAGES >= 2 and STAGES <= 8)
    _arrive(V_EMPTY + stage, CONSUMER_AND_PRODUCER_THREADS)


@gluon.jit
def producer_acquire_k(step, STAGES: gl.constexpr):
    """Wait, before loading the keys of ``step``, for the buffer."""
    if STAGES == 2:  # noqa: SIM102 - a compile-time condition around a run-time one
        if step >= STAGES:
            _sync(K_EMPTY + step % STAGES, CONSUMER_AND_PRODUCER_THREADS)


@gluon.jit
def producer_acquire_v(step, STAGES: gl.constexpr):
    """Wait, before loading the values of ``step``, for the buffer and for that of the next keys."""
    if step >= STAGES - 1:
        _sync(V_EMPTY + (step + 1) % STAGES, CONSUMER_AND_PRODUCER_THREADS)


@gluon.jit
def producer_tail(steps, STAGES: gl.constexpr):
    """Wait until everything that was loaded in all ``steps`` has been given back."""
    if steps > 0:
        for more in gl.static_range(STAGES):
            producer_acquire_k(steps + more, STAGES)
            producer_acquire_v(steps + more, STAGES)


@gluon.jit
def pair_release(stage, alternate):
    """A consumer has read a stage's keys and the values of its own block before.

    Where the lists ``alternate`` the other consumer has nothing to do with the stage.
    """
    _arrive(V_EMPTY + stage, gl.where(alternate, OWNER_AND_PRODUCER_THREADS, CONSUMER_AND_PRODUCER_THREADS))


@gluon.jit
def pair_acquire_v(step, history, STAGES: gl.constexpr):
    """Wait, before loading the values of ``step``, for the buffer and for those of the next keys.

    ``history``: bit ``n`` says whether the lists alternated ``n`` steps ago.
    """
    # With fewer stages a consumer would wait for keys that are loaded after what it holds.
    gl.static_assert(STAGES > PAIR_LAG and STAGES <= 8)
    alternate = (history >> (STAGES - PAIR_LAG)) & 1
    threads = gl.where(alternate != 0, OWNER_AND_PRODUCER_THREADS, CONSUMER_AND_PRODUCER_THREADS)
    if step >= STAGES - PAIR_LAG:
        _sync(V_EMPTY + (step + PAIR_LAG) % STAGES, threads)


@gluon.jit
def pair_tail(steps, history, STAGES: gl.constexpr):
    """:func:`producer_tail` of pairs, in which nothing is given back after the last step's arrival."""
    for more in gl.static_range(STAGES - PAIR_LAG):
        history = history << 1
        pair_acquire_v(steps + more, history, STAGES)
