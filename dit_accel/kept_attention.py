"""Attention of a sparse call over the kept blocks, wherever they are, and over the means of the others."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from .call import AttentionCall
from .kernels.attention.means import LeftOutMeans
from .kernels.pyramid.means import add_left_out_means
from .plan import AttentionPlan
from .ring_attention import attend_around, masks_around
from .stages.precision import Attended, Precision


class Kernel(Protocol):
    """Attention over the kept blocks that this process has."""

    def __call__(
        self, call: AttentionCall, plan: AttentionPlan, with_lse: bool = False, means: LeftOutMeans | None = None
    ) -> Attended: ...


def attend_kept(
    call: AttentionCall, plan: AttentionPlan, kernel: Kernel, precision: Precision, means: LeftOutMeans | None
) -> Attended:
    """Output and witness of a call; with ``means`` they are of one softmax over both, and the witness its log-sum-exp.

    Args:
        kernel: takes means too where the precision's ``why_not_means`` finds nothing. Else, and around a ring, where
            keys come in parts, a launch of its own goes on over them.
    """
    if call.part is not None:
        out, lse = attend_around(call, masks_around(call, plan), partial(kernel, with_lse=True))
    elif means is None or precision.why_not_means(call, plan, means) is None:
        return kernel(call, plan, means is not None, means)
    else:
        out, lse = kernel(call, plan, True)
    if means is None:
        return out, lse
    return add_left_out_means(
        out,
        lse,
        call.q,
        means.means,
        means.kept,
        block_q=plan.mask.block_q,
        rows=plan.rows if call.part is None else None,  # around a ring tokens are in their slots
        scale=call.scale,
        backend=means.backend,
    )
