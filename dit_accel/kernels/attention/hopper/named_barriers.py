"""Named barriers of the Hopper kernel: block buffers given back to the producer, and the consumers' turns.

A warp that has only read says so for itself and goes on; at a barrier in shared memory, which Triton has, its whole
warpgroup would meet before every arrival. Copies arrive at those.

At each of these barriers a warp arrives again only after the other side has passed it, since it needs what that side
does next. What was arrived at last is passed at the end: :func:`await_rest`, and a last turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A program has 16. Triton has the first six here: one for each kind of warps, and one to start them.
_TURNS = gl.constexpr(14)  # two
_VALUES = gl.constexpr(6)  # one a stage, up to eight
_KEYS = gl.constexpr(12)  # two, with two stages
_CONSUMERS = gl.constexpr(256)  # threads of both
_BUFFERS = gl.constexpr(288)  # and those of the producer


@gluon.jit
def _arrive(barrier, threads):
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [barrier, threads], gl.int32, False, 1)


@gluon.jit
def _arrive_here(barrier, threads, length):
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
def _meet(barrier, threads):
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [barrier, threads], gl.int32, False, 1)


@gluon.jit
def pass_turn(half, length):
    """A consumer lets the other one issue its products."""
    _arrive_here(_TURNS + 1 - half, _CONSUMERS, length)


@gluon.jit
def await_turn(half):
    """A consumer waits for the other one to pass the turn."""
    _meet(_TURNS + half, _CONSUMERS)


@gluon.jit
def give_back_keys(stage, length, STAGES: gl.constexpr):
    """A consumer has read a stage's keys. With more than two stages they go back with the values before them."""
    if STAGES == 2:
        _arrive_here(_KEYS + stage, _BUFFERS, length)


@gluon.jit
def give_back_values(stage, STAGES: gl.constexpr):
    """A consumer has read a stage's keys and the values of the step before."""
    gl.static_assert(STAGES >= 2 and STAGES <= 8)
    _arrive(_VALUES + stage, _BUFFERS)


@gluon.jit
def await_keys(step, STAGES: gl.constexpr):
    """Wait, before loading the keys of ``step``, for the buffer."""
    if STAGES == 2:  # noqa: SIM102 - a compile-time condition around a run-time one
        if step >= STAGES:
            _meet(_KEYS + step % STAGES, _BUFFERS)


@gluon.jit
def await_values(step, STAGES: gl.constexpr):
    """Wait, before loading the values of ``step``, for the buffer and for that of the next keys."""
    if step >= STAGES - 1:
        _meet(_VALUES + (step + 1) % STAGES, _BUFFERS)


@gluon.jit
def await_rest(steps, STAGES: gl.constexpr):
    """Wait until everything that was loaded in all ``steps`` has been given back."""
    if steps > 0:
        for more in gl.static_range(STAGES):
            await_keys(steps + more, STAGES)
            await_values(steps + more, STAGES)
