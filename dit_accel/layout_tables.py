"""What a layout needs once under a recipe, whatever the run: blocks, the selection's tables, masks of all blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .call import AttentionCall
from .graph_hold import GraphHold
from .kept_plans import KeptPlan
from .kernels import BlockMask
from .layout import TokenLayout
from .plan import SequenceBlocks
from .recipe import Recipe
from .ring import RingPart
from .run import Bounded
from .stages.select.protocol import Select
from .stages.select.static import FullSelect
from .timing import Stopwatch

TableT = TypeVar("TableT")

# A server sees any number of sizes; the tables of this many stay.
KEPT_LAYOUTS = 8


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a layout needs once: its blocks, and what a static selection worked out for them.

    ``keys`` are where the order moves them, see :class:`~dit_accel.plan.AttentionPlan`. ``plans`` are those of static
    selections, which every run may use; one of a key mask belongs to its run. ``parts`` are shares of the processes
    around a ring.
    """

    blocks: SequenceBlocks
    tables: Any
    keys: torch.Tensor | None = None
    plans: dict[Select, KeptPlan] = field(default_factory=dict)
    parts: dict[Any, RingPart] = field(default_factory=dict)


class LayoutTables:
    """Tables of a few layouts, those that calls had last. Threads may share them.

    What a CUDA graph makes while it is captured is its own, and no other call finds it; see
    :func:`~dit_accel.kept_plans.kept_of`.

    Args:
        recipe: whose order and selection they are of.
        order_time: of making them.
        of_graphs: takes what a captured call reads, since other layouts may take its place here.
    """

    def __init__(self, recipe: Recipe, order_time: Stopwatch, of_graphs: GraphHold) -> None:
        self.recipe = recipe
        self._order_time = order_time
        self._of_graphs = of_graphs
        self._prepared: Bounded[dict[Any, Prepared]] = Bounded(KEPT_LAYOUTS)
        self._full_masks: Bounded[BlockMask] = Bounded(KEPT_LAYOUTS)
        self._order_tables: Bounded[Any] = Bounded(KEPT_LAYOUTS)
        self._padding: Bounded[torch.Tensor] = Bounded(KEPT_LAYOUTS)
        self._lock = threading.Lock()

    def prepare(self, call: AttentionCall) -> Prepared:
        """Blocks and tables of a call, made for it where the order follows the call.

        Raises:
            ValueError: the order is for another number of heads.
        """
        assert isinstance(call.layout, TokenLayout)
        layout, device, order, select = call.layout, call.q.device, self.recipe.order, self.recipe.select
        if order.follows_call:
            # Nothing to keep but the plan, and what the order worked out for the layout.
            with self._order_time.timing(device):
                tables = self._found(call, self._order_tables, (layout, device), lambda: order.prepare(layout, device))
                rows = order.rows_of_call(layout, call, tables)
                blocks = SequenceBlocks(layout, rows, *select.block, device)
                return Prepared(blocks, select.prepare(blocks), order.keys_of_call(layout, call, tables))
        variant = (order.variant(call.layer), None if call.heads is None else call.heads.place)
        # Two threads may run one transformer; the tables are built once.
        with self._lock:
            variants = self._prepared.get((layout, device), dict)
            prepared = variants.get(variant)
            if prepared is None:
                with self._order_time.timing(device):
                    prepared = self._prepare_anew(call)
                if not call.captured:
                    variants[variant] = prepared
            elif call.captured:
                self._of_graphs.add([prepared])
            return prepared

    def _prepare_anew(self, call: AttentionCall) -> Prepared:
        assert isinstance(call.layout, TokenLayout)
        layout, device, order, select = call.layout, call.q.device, self.recipe.order, self.recipe.select
        fixed = order.rows(layout, device, call.layer)
        heads = call.q.shape[2] if call.heads is None else call.heads.total
        if fixed is not None and fixed.dim() == 2 and fixed.shape[0] not in (1, heads):
            raise ValueError(f"The order of layer {call.layer} is for {fixed.shape[0]} heads, the layer has {heads}.")
        if fixed is not None and fixed.dim() == 2 and call.heads is not None:
            fixed = call.heads.own(fixed, 0)
        blocks = SequenceBlocks(layout, fixed, *select.block, device)
        return Prepared(blocks, select.prepare(blocks))

    def padding(self, call: AttentionCall, count: int) -> torch.Tensor:
        """bool ``[B, S + count]``: the call's tokens, without ``count`` of padding behind them.

        The same tensor for all layers: what hides keys is compared by content once a forward.
        """
        batch, device = call.q.shape[0], call.q.device
        length = call.k.shape[1] if call.ring is None else call.ring.total

        def visible() -> torch.Tensor:
            return (torch.arange(length + count, device=device) < length).expand(batch, -1)

        return self._found(call, self._padding, (length, count, batch, device), visible)

    def full_mask(self, call: AttentionCall) -> BlockMask:
        """All blocks of a layout, in the model's order."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.full_mask(call)
        assert isinstance(call.layout, TokenLayout)
        full = FullSelect(block=(128, 128))  # the kernel is fastest at these
        blocks = SequenceBlocks(call.layout, None, *full.block, call.q.device)

        def make() -> BlockMask:
            return full.select(blocks, None, call)

        if call.key_mask is not None:
            return make()
        return self._found(call, self._full_masks, (call.layout, call.q.device), make)

    def _found(self, call: AttentionCall, tables: Bounded[TableT], key: Hashable, make: Callable[[], TableT]) -> TableT:
        """The entry of a key, made where there is none."""
        if not call.captured:
            return tables.get(key, make)
        if key not in tables.entries:
            return make()
        found = tables.get(key, make)
        self._of_graphs.add([found])
        return found

    def clear(self) -> None:
        """Drop all of them."""
        self._prepared.clear()
        self._order_tables.clear()
        self._full_masks.clear()
        self._padding.clear()
