"""Attention of a sparse call over the kept blocks, wherever they are, and over the means of the others."""

from __future__ import annotations

from collections.abc import Callable

from .call import AttentionCall
from .kernels.attention.means import LeftOutMeans
from .kernels.pyramid.means import add_left_out_means
from .plan import AttentionPlan
from .ring_attention import attend_around, masks_around
from .stages.precision import Attended, Precision


def attend_kept(
    call: AttentionCall,
    plan: AttentionPlan,
    precision: Precision,
    backend_of: Callable[[AttentionCall, AttentionPlan], str],
    with_lse: bool,
    means: LeftOutMeans | None,
) -> Attended:
    """Output and witness of a call; with ``means`` they are of one softmax over both, and the witness its log-sum-exp.

    One launch, where the precision takes means. Else, and around a ring, where keys come in parts, another one goes on
    over them.

    Args:
        backend_of: the backend of attention to kept blocks that this process has.
        with_lse: the witness is the log-sum-exp also without means.
    """
    if call.part is not None:

        def attend_part(here: AttentionCall, its: AttentionPlan) -> Attended:
            return precision.attend(here, its, backend_of(here, its), True)

        out, lse = attend_around(call, masks_around(call, plan), attend_part)
    else:
        backend = backend_of(call, plan)
        if means is None:
            return precision.attend(call, plan, backend, with_lse)
        if precision.why_not_means(call, plan, backend, means) is None:
            return precision.attend(call, plan, backend, True, means)
        out, lse = precision.attend(call, plan, backend, True)
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
