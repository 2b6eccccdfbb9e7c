"""Parameters of a recipe in one attention layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..heads import HeadShard


class LearnedLayer(nn.Module):
    """Parameters of one attention layer; :func:`dit_accel.patch` puts them under the layer."""

    def per_head(self) -> tuple[str, ...]:
        """Names of the parameters that have an entry for each head, along their first axis; others serve all heads."""
        return ()

    def among(
        self, heads: HeadShard | None, parameters: Sequence[torch.Tensor] | None = None
    ) -> Callable[..., torch.Tensor]:
        """What computes as this layer does.

        Args:
            heads: for these heads of all; None for all.
            parameters: with these in place of its own, in the order of ``parameters()``.
        """
        if heads is None and parameters is None:
            return self
        own: dict[str, torch.Tensor] = dict(self.named_parameters())
        given = own if parameters is None else dict(zip(own, parameters, strict=True))
        if heads is not None:
            given |= {name: heads.own(given[name], 0) for name in self.per_head()}
        return lambda *args, **kwargs: functional_call(self, given, args, kwargs)

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
