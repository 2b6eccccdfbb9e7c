"""Dense attention of a call by the block-sparse kernel, over all blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .call import AttentionCall
from .kernels import block_sparse_attention
from .kernels.attention.api import choose_backend
from .kernels.attention.variants import ON_HOPPER
from .kernels.common.choice import Choice, Operation
from .layout_tables import LayoutTables
from .plan import AttentionPlan
from .ring_attention import attend_around, full_masks_around

SEARCH: Operation = "search_attention"
DENSE: Operation = "dense_attention"


def kernel_over_all(
    call: AttentionCall, tables: LayoutTables, backend: str, operation: Operation
) -> tuple[Choice, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Which backend attends to all blocks of a call, and what computes it.

    Args:
        operation: what an error calls it, :data:`SEARCH` or :data:`DENSE`.

    Returns:
        The choice, and a function without arguments that returns the output, ``[B, S, H, D]``, and the log-sum-exp,
        float32 ``[B, H, S]``; around a ring those of this process' slots.
    """
    parts = None if call.part is None else full_masks_around(call)
    mask = tables.full_mask(call) if parts is None else parts[0]
    choice = choose_backend(call.q, call.k, call.v, mask, key_mask=call.key_mask, backend=backend, operation=operation)

    def kernel(call: AttentionCall, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        key_mask, scale = call.key_mask, call.scale
        attended = block_sparse_attention(
            call.q, call.k, call.v, plan.mask, key_mask=key_mask, scale=scale, return_lse=True, backend=choice.name
        )
        assert isinstance(attended, tuple)
        return attended

    if parts is None:
        return choice, lambda: kernel(call, AttentionPlan(None, mask))
    return choice, lambda: attend_around(call, parts.__getitem__, kernel)


def keeps_up_with_dense(choice: Choice) -> bool:
    """Whether the kernel of this choice is over all blocks as fast as torch's dense attention, or faster.

    The Hopper kernel is: in bfloat16, 0.27 s for 118,800 tokens of 24 heads of 128, where cuDNN takes 0.43 s (H200); at
    head dim 64 its steps of 128 keys run at 500 TFLOP/s (H200), cuDNN at 476 (H100). The portable kernel is not.
    """
    return choice.name == "triton" and choice.reason.endswith(ON_HOPPER)
