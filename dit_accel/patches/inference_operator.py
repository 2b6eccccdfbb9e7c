"""The opaque operator of :mod:`.operator` for graphs that were traced without gradients.

It has no rule for autograd and takes none of the wrappers that ``torch.library.custom_op`` puts around a function:
together they took the host a third of a call.
"""

from __future__ import annotations

from typing import Any

import torch

from .operator import TAGS, attend

_NAME = "dit_accel::attention_inference"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor layer, int[] places, int count, Tensor? ids, "
    "Tensor[] learned, float? scale, bool enable_gqa, str? backend, bool through_dispatch, bool parallel) -> Tensor",
    tags=TAGS,
)


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _(*args: Any) -> torch.Tensor:
    """Attention of the announced layer, (B, S, H, D), contiguous."""
    return attend(*args).contiguous()


@torch.library.register_fake(_NAME)
def _(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape[:-1] + v.shape[-1:])


inference_attention_op = torch.ops.dit_accel.attention_inference.default
