"""Which kernel of the Triton backend runs a call: the Hopper one where it applies, else the portable one."""

from __future__ import annotations

import os

import torch

from .block_mask import BlockMask
from .quantize import QuantizedInputs


def why_not_hopper_half(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None
) -> str | None:
    """Why the Hopper kernel cannot run a half-precision call, or None if it can."""
    return _import_reason(q) or _hopper().why_not_hopper(q, k, v, mask, rows)


def why_not_hopper_quantized(q: torch.Tensor, mask: BlockMask, quantized: QuantizedInputs) -> str | None:
    """Why the Hopper kernel cannot run a quantised call, or None if it can."""
    if quantized.smooth_q:
        return "it does not add the query means back"
    return _import_reason(q) or _hopper().why_not_hopper_shape(q, mask)


def _import_reason(q: torch.Tensor) -> str | None:
    if not q.is_cuda or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "it needs a GPU"
    try:
        _hopper()
    except ImportError as error:  # Gluon is experimental: other Triton versions may lack a name
        return f"this Triton lacks a part of Gluon ({error})"
    return None


def _hopper():
    from . import hopper_forward

    return hopper_forward
