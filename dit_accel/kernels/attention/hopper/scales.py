"""Scales of quantised queries and keys in the Hopper kernel: what makes INT8 products scores in base 2."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def query_scales(head, first_slot, sizes, tensors, LANES: gl.constexpr):
    """``[64, 1]``: scales of 64 query rows, each times that of the softmax."""
    slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, LANES))[:, None]
    return gl.load(tensors.q_scale_ptr + head * sizes.q_rows + slot) * tensors.softmax_scale_log2


@gluon.jit
def key_scales_at(head, sizes, tensors, BLOCK_K: gl.constexpr, THREAD_SCALES: gl.constexpr, LANES: gl.constexpr):
    """Where the scale of a head's first key block lies, or its four, ``[1, 4]``, each of one thread's keys."""
    scales_at = tensors.k_scale_ptr + head * (sizes.k_rows // BLOCK_K) * (4 if THREAD_SCALES else 1)
    if THREAD_SCALES:
        scales_at += gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :]
    return scales_at
