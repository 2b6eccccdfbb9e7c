"""Plans of a transformer's attention calls: made by the stages of a recipe, kept, or taken from a calibration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .call import AttentionCall
from .kernels import BlockMask
from .kernels.packed_mask import PackedBlockMask
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LayerMemory, SequenceBlocks
from .recipe import Recipe
from .records import LayerRecord
from .stages.drift import BlockMeans
from .stages.frozen import FrozenMasks
from .stages.order_sorted import Segments, SortedSegments
from .stages.select import HeadDensities, Select, density_of_layer
from .stages.select_mass import FrozenMass, Mass
from .stages.select_static import DenseSelect, FullSelect
from .timing import Stopwatch


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a layout needs once: its blocks, and what a static selection worked out for them."""

    blocks: SequenceBlocks
    tables: Any


@dataclass(frozen=True, eq=False)
class _KeptPlan:
    """A plan, when it was made, of which queries and keys where the schedule guards against drift, and for which
    key mask: holding it keeps its memory from becoming another mask's.

    The mask of a single layer is packed: the lists of all layers and branches of a large model are gigabytes.
    """

    made: StepContext
    rows: torch.Tensor | None
    mask: BlockMask | PackedBlockMask
    compensation: Any
    means: BlockMeans | None
    key_mask: torch.Tensor | None

    @property
    def plan(self) -> AttentionPlan:
        mask = self.mask.lists() if isinstance(self.mask, PackedBlockMask) else self.mask
        return AttentionPlan(self.rows, mask, self.compensation)

    def fits_static(self, call: AttentionCall) -> bool:
        """Whether the plan of a static selection serves this call too: all layers of a forward share a mask."""
        one, other = self.key_mask, call.key_mask
        if one is None or other is None:
            return one is other
        return (
            self.made.forward_id == call.step.forward_id
            and one.data_ptr() == other.data_ptr()
            and (one.shape, one.stride()) == (other.shape, other.stride())
        )


class Planner:
    """Plans under one recipe.

    Attributes:
        density: in place of the selection's own and the schedule's, while a training anneals it.
        frozen: masks of a calibration, in place of the recipe's own selection.
        rederive: select anew where the frozen masks do not fit, rather than raise.
        parts: time of making plans: "order" (and what a layout needs once), "select", "compensate".
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.density: float | None = None
        self.frozen: FrozenMasks | None = None
        self.rederive = False
        self.parts = {part: Stopwatch() for part in ("order", "select", "compensate")}
        self._frozen_plans: dict[tuple[Any, ...], tuple[tuple[Any, ...], _KeptPlan]] = {}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._full_masks: dict[tuple[Any, ...], BlockMask] = {}
        self._segments: dict[tuple[Any, ...], Segments] = {}
        self._plans: dict[tuple[Any, ...], _KeptPlan] = {}
        self._memories: dict[tuple[Any, ...], tuple[StepContext, LayerMemory]] = {}
        self._lock = threading.Lock()

    def plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        """The plan of a call, and when it was made."""
        assert isinstance(call.layout, TokenLayout)
        if self.frozen is not None:
            reason = self._why_not_frozen(call, self.frozen)
            if reason is None:
                return call.step, self._frozen_plan(call, self.frozen, book)
            if not self.rederive:
                raise ValueError(f"{reason} Calibrate for this, or patch with rederive=True to select anew.")
        device = call.q.device
        q, k = call.q.detach(), call.k.detach()
        select, schedule = self._selection(call), self.recipe.schedule
        key = self._plan_key(call)
        keep = select.is_static or schedule.keeps_plans
        kept = self._plans.get(key) if keep else None
        if kept is not None and select.is_static and not kept.fits_static(call):
            kept = None
        guarded = keep and schedule.drift_bound is not None and not select.is_static
        means = None
        with torch.no_grad():
            if kept is not None and (select.is_static or not schedule.needs_plan(call.step, kept.made)):
                if kept.means is None or call.step.forward_id == kept.made.forward_id:
                    return kept.made, kept.plan
                means = BlockMeans.of(q, k, call.key_mask, select.block)
                assert schedule.drift_bound is not None
                if bool(means.change_since(kept.means) <= schedule.drift_bound):
                    return kept.made, kept.plan
            memory = None if select.is_static else self._memory(key, call.step)
            with self._timed("order", device):
                prepared = self._prepare(call)
            with self._timed("select", device):
                mask = select.select(prepared.blocks, prepared.tables, q, k, call.key_mask, call.scale, memory)
            if guarded and means is None:
                means = BlockMeans.of(q, k, call.key_mask, select.block)
            with self._timed("compensate", device):
                compensate = self.recipe.compensate
                state = compensate.prepare(prepared.blocks, mask, q, k, call.key_mask, call.scale, memory)
            if memory is not None:
                memory.found = None
                if not schedule.plans_after(call.step):
                    memory.lse = None
            rows = prepared.blocks.kernel_rows
            if keep:
                kept_mask = self._to_keep(mask, call)
                self._plans[key] = _KeptPlan(call.step, rows, kept_mask, state, means, call.key_mask)
        book.plans_made += 1
        return call.step, AttentionPlan(rows, mask, state)

    def is_search(self, call: AttentionCall, made: StepContext) -> bool:
        """Whether a plan made at ``made`` is of a search in this very forward, whose attention the recipe has dense."""
        # A bare transformer has no trajectory, and a forward of it would search each time.
        searching = self.frozen is None and call.step.index is not None and made.forward_id == call.step.forward_id
        return self.recipe.schedule.dense_refresh and searching

    def memory_of_search(self, call: AttentionCall) -> LayerMemory | None:
        """Where a coming search looks for the log-sum-exp of its step's attention; None where none is of use."""
        schedule, select = self.recipe.schedule, self.recipe.select
        if self.frozen is not None or not schedule.dense_refresh or call.step.index is None:
            return None
        if not isinstance(select, Mass | FrozenMass) or any(x.requires_grad for x in (call.q, call.k, call.v)):
            return None
        assert isinstance(call.layout, TokenLayout)
        key = self._plan_key(call)
        kept = self._plans.get(key)
        if kept is not None and not schedule.needs_plan(call.step, kept.made):
            return None
        memory = self._memory(key, call.step)
        if not select.uses_lse(call.layout, call.key_mask) or memory.lse is not None:
            return None
        return memory

    def full_mask(self, call: AttentionCall) -> BlockMask:
        """All blocks of a layout, in the model's order."""
        assert isinstance(call.layout, TokenLayout)
        key = (call.layout, call.q.device)
        if call.key_mask is None and key in self._full_masks:
            return self._full_masks[key]
        full = FullSelect(block=(128, 128))  # the kernel is fastest at these
        blocks = SequenceBlocks(call.layout, None, *full.block, call.q.device)
        mask = full.select(blocks, None, call.q, call.k, call.key_mask, call.scale)
        if call.key_mask is None:
            self._full_masks[key] = mask
        return mask

    def forget(self) -> None:
        """Drop every plan, memory and cached table."""
        self.forget_plans()
        self._memories.clear()
        self._prepared.clear()
        self._segments.clear()
        self._full_masks.clear()

    def forget_plans(self) -> None:
        """Drop every plan; orders and tables of a layout stay."""
        self._plans.clear()
        self._frozen_plans.clear()

    def _to_keep(self, mask: BlockMask, call: AttentionCall) -> BlockMask | PackedBlockMask:
        """The mask in the least memory that it allows: one of all layers is short enough as lists."""
        if not self.recipe.select.is_static and mask.token_bits is None:
            return PackedBlockMask.of(mask, call.key_mask is not None)
        # A static mask of a key mask serves a single forward: not worth waiting for the device.
        return mask if call.key_mask is not None else mask.trimmed()

    def _plan_key(self, call: AttentionCall) -> tuple[Any, ...]:
        """Which calls may share a plan: of a static selection all layers of one order, steps and branches."""
        if self.recipe.select.is_static:
            return call.layout, call.q.device, self.recipe.order.variant(call.layer)
        return call.layer, call.step.branch, call.layout, call.q.shape[0], call.q.device

    @contextmanager
    def _timed(self, part: str, device: torch.device) -> Iterator[None]:
        begin = self.parts[part].start(device)
        yield
        self.parts[part].stop(begin, device)

    @staticmethod
    def _why_not_frozen(call: AttentionCall, frozen: FrozenMasks) -> str | None:
        if call.layout != frozen.layout:
            return f"The calibration is for {_spell(frozen.layout)}, the call has {_spell(call.layout)}."
        if call.step.sigma is None:
            return "Calibrated plans are found by sigma, and a bare model or this scheduler shows none."
        return None

    def _frozen_plan(self, call: AttentionCall, frozen: FrozenMasks, book: LayerRecord) -> AttentionPlan:
        """The calibrated plan of a call; the last one of each layer and branch is kept on the device."""
        assert call.step.sigma is not None
        bucket = frozen.bucket(call.step.sigma)
        compensate = self.recipe.compensate
        place = (call.layer, call.q.device, None if compensate.is_static else call.step.branch)
        version = (bucket, None if compensate.is_static else call.q.shape[0])
        kept = self._frozen_plans.get(place) if call.key_mask is None else None
        if kept is not None and kept[0] == version:
            return kept[1].plan
        with torch.no_grad():
            prepared = self._prepare(call)
            mask = frozen.mask(call.layer, bucket, prepared.blocks, call.key_mask)
            q, k = call.q.detach(), call.k.detach()
            state = compensate.prepare(prepared.blocks, mask, q, k, call.key_mask, call.scale)
        rows = prepared.blocks.kernel_rows
        if call.key_mask is None:
            packed = PackedBlockMask.of(mask, key_mask=False)
            self._frozen_plans[place] = (version, _KeptPlan(call.step, rows, packed, state, None, None))
        book.plans_made += 1
        return AttentionPlan(rows, mask, state)

    def _selection(self, call: AttentionCall) -> Select:
        """The recipe's selection with the density that holds for this layer and step."""
        select = self.recipe.select
        assert not isinstance(select, DenseSelect)
        density = self.recipe.schedule.density(call.step) if self.density is None else self.density
        per_head: HeadDensities = getattr(select, "head_densities", ())
        if density is not None:
            uniform = {"density": density, "head_densities": ()} if per_head else {"density": density}
            return replace(select, **uniform)  # type: ignore[type-var]
        if per_head:
            return replace(select, head_densities=density_of_layer(per_head, call.layer))  # type: ignore[type-var]
        return select

    def _memory(self, key: tuple[Any, ...], step: StepContext) -> LayerMemory:
        """The layer's memory of this run: empty in a new run, and always without a pipeline."""
        if step.index is None:
            return LayerMemory()
        last, memory = self._memories.get(key, (step, LayerMemory()))
        if last.index is None or (step.index <= last.index and step.forward_id != last.forward_id):
            memory = LayerMemory()
        self._memories[key] = (step, memory)
        return memory

    def _prepare(self, call: AttentionCall) -> _Prepared:
        assert isinstance(call.layout, TokenLayout)
        layout, device, order, select = call.layout, call.q.device, self.recipe.order, self.recipe.select
        assert not isinstance(select, DenseSelect)
        if isinstance(order, SortedSegments):
            # An order of the call itself: nothing to keep but the plan, and which tokens a segment holds.
            place = (layout, device)
            if place not in self._segments:
                self._segments[place] = order.segments(layout, device)
            q, k, segments = call.q.detach(), call.k.detach(), self._segments[place]
            rows = order.rows_of_call(layout, q, k, call.key_mask, call.scale, segments)
            blocks = SequenceBlocks(layout, rows, *select.block, device)
            return _Prepared(blocks, select.prepare(blocks))
        key = (layout, device, order.variant(call.layer))
        # Two threads may run one transformer; the tables are built once.
        with self._lock:
            if key not in self._prepared:
                fixed = order.rows(layout, device, call.layer)
                heads = call.q.shape[2]
                if fixed is not None and fixed.dim() == 2 and fixed.shape[0] not in (1, heads):
                    raise ValueError(
                        f"The order of layer {call.layer} is for {fixed.shape[0]} heads, the layer has {heads}."
                    )
                blocks = SequenceBlocks(layout, fixed, *select.block, device)
                self._prepared[key] = _Prepared(blocks, select.prepare(blocks))
            return self._prepared[key]


def _spell(layout: TokenLayout | str) -> str:
    if isinstance(layout, str):
        return layout
    frames, height, width = layout.grid
    return f"a latent grid of {frames}x{height}x{width} from token {layout.latent_start} of {layout.seq_len}"
