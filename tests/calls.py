"""Attention calls outside an engine, as stages see them."""

from __future__ import annotations

import torch

from dit_accel.call import AttentionCall
from dit_accel.layout import StepContext


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> AttentionCall:
    """A call of (B, S, H, D) tensors with the default scale, for which every operation chooses its backend."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(0, StepContext(), q, k, k if v is None else v, key_mask, scale, "no layout")
