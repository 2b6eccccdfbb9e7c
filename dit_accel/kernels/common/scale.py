"""The factor on the logits of an attention."""

from __future__ import annotations

import torch


def scale_of(q: torch.Tensor, scale: float | None) -> float:
    """``scale``, or the default for queries ``[..., D]``: ``D ** -0.5``."""
    return q.size(-1) ** -0.5 if scale is None else scale
