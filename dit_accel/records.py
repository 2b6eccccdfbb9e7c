"""What the layers of a patched transformer did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class LayerRecord:
    """What one self-attention layer did: counters, and tensors that are only read when asked for.

    Attributes:
        compiled_dense: dense calls that compiled code counted by itself, int64 by reason; see
            :data:`dit_accel.patches.operator.PASSED`.
    """

    name: str
    dense_calls: Counter[str] = field(default_factory=Counter)
    sparse_calls: int = 0
    plans_made: int = 0
    density_sum: torch.Tensor | float = 0.0
    nan_calls: torch.Tensor | int = 0
    compiled_dense: torch.Tensor | None = None
