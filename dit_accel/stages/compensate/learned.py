"""What a recipe learns in one attention layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...call import AttentionCall
from ...plan import AttentionPlan
from ...ring import RingPart
from ..learned_layer import LearnedLayer


class LearnedCompensation(LearnedLayer):
    """Parameters of one attention layer's compensation."""

    def forward(self, out: torch.Tensor, call: AttentionCall, plan: AttentionPlan) -> torch.Tensor:
        """The sparse output with what the layer adds to it, (B, S, H, D) in the model's order; around a ring in that of
        this process' slots."""
        raise NotImplementedError


class LearnedGate(LearnedLayer):
    """A linear map of an attention layer's input to a number for every feature of every head.

    Parameters ``weight [H * D, C]`` and ``bias [H * D]``, zero at the start.
    """

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(heads * head_dim, width))
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, n, H, D]`` of the layer's input ``[B, n, C]``, in its dtype."""
        out = F.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))
        return out.unflatten(-1, (self.heads, -1))


def gate_of_latents(call: AttentionCall) -> tuple[torch.Tensor, int]:
    """What a :class:`LearnedGate` made of the latents, ``[B, n, H, D]``, and the place of the first in the sequence.

    Around a ring it is of this process' slots, and zero where a slot holds another token.

    Raises:
        ValueError: the layer's input holds neither the latents alone nor the whole sequence.
    """
    layout, gate = call.layout, call.gate
    assert not isinstance(layout, str)
    assert gate is not None
    if call.part is not None:
        return torch.where(latents_here(call, call.part), gate, 0.0), 0
    length = layout.seq_len - layout.padding
    if gate.shape[1] not in (length, layout.num_latent):
        raise ValueError(
            f"The layer's input has {gate.shape[1]} tokens; a gate needs its {layout.num_latent} latents or the "
            f"whole sequence of {length}."
        )
    if gate.shape[1] == length:
        gate = gate[:, layout.latent_start : layout.latent_start + layout.num_latent]
    return gate, layout.latent_start


def latents_here(call: AttentionCall, part: RingPart) -> torch.Tensor:
    """Which slots of this process' queries around a ring hold a latent of what is generated, bool
    ``[1, n, H|1, 1]``."""
    layout, span = call.layout, part.queries_here()
    assert not isinstance(layout, str)
    tokens = torch.arange(span.start, span.stop, device=call.q.device) if part.slots is None else part.slots[..., span]
    found = (tokens >= layout.latent_start) & (tokens < layout.latent_start + layout.num_latent)
    return found.reshape(-1, found.shape[-1]).T[None, ..., None]
