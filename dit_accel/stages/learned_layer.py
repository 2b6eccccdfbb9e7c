"""Parameters of a recipe in one attention layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LearnedLayer(nn.Module):
    """Parameters of one attention layer; :func:`dit_accel.patch` puts them under the layer."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LearnedLayer:
        # The parameters stay in full precision when a model is cast to half: steps of a fine-tuning are
        # smaller than what half precision resolves.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            narrower = result.is_floating_point() and result.element_size() < tensor.element_size()
            return tensor.to(result.device) if narrower else result

        super()._apply(moved, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: the copy of a patched model is not patched, and torch reads None as no module."""
