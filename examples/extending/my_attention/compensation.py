"""A compensation: what is left out stands in by the mean of all values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.plan import AttentionPlan
from dit_accel.stages.compensate.protocol import Attended, Compensation


@dit_accel.register("mean_value")
@dataclass(frozen=True)
class MeanValue(Compensation):
    """A share of the mean value is mixed in, as large as the share of the blocks left out times a strength.

    Attributes:
        strength: 0 changes nothing, 1 takes the blocks left out for as likely as those kept.
    """

    strength: float = 0.1
    is_static: ClassVar[bool] = True  # nothing is worked out from queries and keys

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"compensate.strength must lie in [0, 1], got {self.strength}.")

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        out, witness = sparse()  # (B, S, H, D), and a tensor with a NaN where the output has one
        values = call.v.float()
        if call.key_mask is None:
            mean = values.mean(1, keepdim=True)
        else:
            seen = call.key_mask[..., None, None]
            mean = values.masked_fill(~seen, 0.0).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        share = (1.0 - plan.mask.density()) * self.strength
        return torch.lerp(out.float(), mean.expand_as(out), share.float()).to(out.dtype), witness
