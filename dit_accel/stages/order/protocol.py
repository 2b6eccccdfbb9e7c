"""What an order of the sequence offers to the engine."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, Protocol

import torch

from ...call import AttentionCall
from ...layout import TokenLayout
from ..select.protocol import Select


class Order(Protocol):
    """An order of the sequence. Tokens on grids are permuted, each grid by itself; all others follow in their order.

    A kind inherits from this class, and says where it differs from what stands here.

    Attributes:
        permutes: it is another order than the model's.
        spans_references: it orders grids of references too; else these are other tokens.
        follows_call: it depends on queries and keys, see :meth:`rows_of_call` and :meth:`keys_of_call`.
        needs_calibration: a calibration puts another order in its place.
        pads: it fills blocks with padding, see :meth:`padding`.
    """

    permutes: ClassVar[bool] = True
    spans_references: ClassVar[bool] = True
    follows_call: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    pads: ClassVar[bool] = False

    @property
    def is_of_one_model(self) -> bool:
        """Whether it names the layers or heads of a certain model."""
        return self.needs_calibration

    def conflicts_with(self, select: Select) -> str | None:
        """A sentence that says why the order cannot serve a selection; None where it can."""
        if self.follows_call and select.is_static:
            return (
                "An order that follows the attention of a call needs a selection that does so too, got "
                f"{type(select).__name__}."
            )
        return None

    def variant(self, layer: int) -> Hashable:
        """Layers with equal variants share their order."""
        return None

    def padding(self, layout: TokenLayout) -> int:
        """Tokens of padding that :meth:`rows` expects behind the sequence, to fill blocks."""
        return 0

    def rows(self, layout: TokenLayout, device: torch.device, layer: int = 0) -> torch.Tensor | None:
        """int32 ``[S]``, or ``[H, S]`` with an order per head: the token at each slot; None for the order of
        the model."""
        ...

    def prepare(self, layout: TokenLayout, device: torch.device) -> Any:
        """What :meth:`rows_of_call` can have worked out once for a layout."""
        return None

    def rows_of_call(self, layout: TokenLayout, call: AttentionCall, tables: Any = None) -> torch.Tensor | None:
        """:meth:`rows` of a call, or ``[B, H, S]`` where they follow its queries and keys.

        ``tables`` are what :meth:`prepare` returned, where that is at hand.
        """
        return self.rows(layout, call.q.device, call.layer)

    def keys_of_call(self, layout: TokenLayout, call: AttentionCall, tables: Any = None) -> torch.Tensor | None:
        """int32 ``[B, H, S]``: the token whose key and value take each token's place before the order is applied, in
        attention the same keys; None where all keep theirs. ``tables`` as in :meth:`rows_of_call`."""
        return None
