"""Which kernel of the Triton backend runs a call: the Hopper one where it applies, else the portable one."""

from __future__ import annotations

import os

import torch

from .block_mask import BlockMask


def why_not_hopper_half(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None
) -> str | None:
    """Why the Hopper kernel cannot run a half-precision call, or None if it can.

    The staged kernel, also for quantised inputs, is not chosen here: it has not been run on a GPU yet.
    """
    if not q.is_cuda or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "it needs a GPU"
    try:
        from .hopper_forward import why_not_hopper
    except ImportError as error:  # Gluon is experimental: other Triton versions may lack a name
        return f"this Triton lacks a part of Gluon ({error})"
    return why_not_hopper(q, k, v, mask, rows)
