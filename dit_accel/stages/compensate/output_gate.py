"""A gate on the attention's output, learned: Quantizable Transformers (arXiv 2306.12929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...plan import AttentionPlan
from .learned import LearnedGate, gate_of_latents
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class OutputGate(Compensation):
    """Nothing stands in for what is left out; the output of the latents is multiplied by a learned gate.

    ``out = 2 sigmoid(W x + b) * sparse``, of the attention layer's input ``x``, a number for every feature of every
    head (the paper's linear gate, which there is one number a head). ``W`` and ``b`` are zero at the start, so that an
    untrained gate is one. A head can then write nothing without attending to one key with all its weight, which makes
    the outliers that 8 bits cannot hold. Other tokens than latents keep their output.
    """

    is_static: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True
    reads_input: ClassVar[bool] = True
    spans_references: ClassVar[bool] = False
    goes_round: ClassVar[bool] = True

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:  # noqa: ARG002
        """The sparse attention, gated."""
        out, witness = sparse()
        gate, first = gate_of_latents(call)
        factor = 2.0 * gate.float().sigmoid()
        latents = (out[:, first : first + gate.shape[1]] * factor).to(out.dtype)
        parts = (out[:, :first], latents, out[:, first + gate.shape[1] :])
        return torch.cat(parts, 1), witness

    def build_gate(self, heads: int, head_dim: int, width: int) -> LearnedGate:
        """The gate of one layer, zero."""
        return LearnedGate(heads, head_dim, width)
