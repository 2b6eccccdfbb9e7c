"""One attention call under a recipe: dense or sparse, with which plan, and what it cost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.func import functional_call

from .kernels import BlockMask, block_sparse_attention
from .kernels.block_sparse import choose_backend
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LayerMemory, SequenceBlocks
from .recipe import Recipe
from .stages.compensate_linear import LearnedCompensation
from .stages.drift import BlockMeans
from .stages.frozen import FrozenMasks
from .stages.order_sorted import Segments, SortedSegments
from .stages.select import HeadDensities, Select, density_of_layer
from .stages.select_mass import FrozenMass, Mass
from .stages.select_static import DenseSelect, FullSelect
from .timing import Stopwatch


@dataclass
class LayerRecord:
    """What one self-attention layer did: counters, and tensors that are only read when asked for."""

    name: str
    dense_calls: Counter[str] = field(default_factory=Counter)
    sparse_calls: int = 0
    plans_made: int = 0
    density_sum: torch.Tensor | float = 0.0
    nan_calls: torch.Tensor | int = 0


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a layout needs once: its blocks, and what a static selection worked out for them."""

    blocks: SequenceBlocks
    tables: Any


@dataclass(eq=False)
class AttentionCall:
    """One attention call: tensors (B, S, H, D) after norms and rotary embedding.

    Attributes:
        layer: index of the self-attention layer.
        step: where the call sits in the trajectory.
        key_mask: bool ``[B, S]``, False for hidden keys.
        scale: of the logits; None for the default.
        layout: of the sequence, or the reason why there is none.
        plan: what a sparse call ran; None for a dense one.
    """

    layer: int
    step: StepContext
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    scale: float | None
    layout: TokenLayout | str
    plan: AttentionPlan | None = None


@dataclass(frozen=True, eq=False)
class _KeptPlan:
    """A plan, when it was made, of which queries and keys where the schedule guards against drift, and for which
    key mask: holding it keeps its memory from becoming another mask's."""

    made: StepContext
    plan: AttentionPlan
    means: BlockMeans | None
    key_mask: torch.Tensor | None

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


# Sees layer, output and the model's own attention of a call (None where that is the output already); what it
# returns takes the output's place.
OutputTap = Callable[[int, torch.Tensor, Callable[[], torch.Tensor] | None], torch.Tensor]


class Engine:
    """Attention of one transformer under one recipe.

    Args:
        recipe: what to do.
        layer_names: the self-attention modules, in order of execution.
        backend: of :func:`~dit_accel.kernels.block_sparse_attention`.
        min_tokens: stay dense below this sequence length.

    Attributes:
        switched_on: False lets every call through to the model's own attention, uncounted.
        density: in place of the selection's own and the schedule's, while a training anneals it.
        output_tap: sees, and may replace, every output; for losses on attention outputs.
        learned: learned compensation of each layer by index; empty for recipes without parameters.
        frozen: masks of a calibration, in place of the recipe's own selection.
        rederive: select anew where the frozen masks do not fit, rather than raise.
        plan_parts: time of making plans by part: "order" (and what a layout needs once), "select", "compensate".
    """

    def __init__(self, recipe: Recipe, layer_names: list[str], backend: str, min_tokens: int) -> None:
        self.recipe = recipe
        self.backend = backend
        self.min_tokens = min_tokens
        self.records = [LayerRecord(name) for name in layer_names]
        self.plan_time = Stopwatch()
        self.plan_parts = {part: Stopwatch() for part in ("order", "select", "compensate")}
        self.sparse_time = Stopwatch()
        self.dense_time = Stopwatch()
        self.backends_used: dict[str, str] = {}
        self.observer: Callable[[AttentionCall], None] | None = None
        self.switched_on = True
        self.density: float | None = None
        self.output_tap: OutputTap | None = None
        self.learned: dict[int, LearnedCompensation] = {}
        self.frozen: FrozenMasks | None = None
        self.rederive = False
        self._frozen_plans: dict[tuple[Any, ...], tuple[tuple[Any, ...], AttentionPlan]] = {}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._full_masks: dict[tuple[Any, ...], BlockMask] = {}
        self._segments: dict[tuple[Any, ...], Segments] = {}
        self._plans: dict[tuple[Any, ...], _KeptPlan] = {}
        self._memories: dict[tuple[Any, ...], tuple[StepContext, LayerMemory]] = {}
        self._backend_choice: dict[tuple[Any, ...], str] = {}
        self._lock = threading.Lock()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        layout: TokenLayout | str,
        step: StepContext,
        dense: Callable[[], torch.Tensor],
        record: bool = True,
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of (B, S, H, D) queries, keys and values.

        Args:
            layer: index into the layer names.
            attn_mask: as given to the model's own attention.
            layout: of the sequence, or the reason why there is none.
            step: where the call sits in the trajectory.
            dense: the model's own attention for this very call.
            record: whether to count the call; False when a call is repeated for its gradients.
            learned: parameters to use in place of the layer's own, in the order of ``parameters()``: a
                compiled graph hands them in so that they get their gradients.
        """
        if not self.switched_on:
            out = dense()
            return out if self.output_tap is None else self.output_tap(layer, out, None)
        out, was_dense = self._attend(layer, q, k, v, attn_mask, scale, layout, step, dense, record, learned)
        return out if self.output_tap is None else self.output_tap(layer, out, None if was_dense else dense)

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        layout: TokenLayout | str,
        step: StepContext,
        dense: Callable[[], torch.Tensor],
        record: bool,
        learned: Sequence[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, bool]:
        """The output, and whether it is the model's own attention's."""
        key_mask, reason = _key_mask(attn_mask, q)
        call = AttentionCall(layer, step, q, k, v, key_mask, scale, layout)
        book = self.records[layer] if record else LayerRecord("")
        reason = reason or self._dense_reason(call)
        if reason is not None:
            return self._run_dense(call, reason, dense, book), True
        with _autocast_done(call):
            exact = self._searched_attention(call)
            begin = self.plan_time.start(q.device)
            made, plan = self._plan(call, book)
            backend = self._choose_backend(call, plan)
            self.plan_time.stop(begin, q.device)
            # A bare transformer has no trajectory, and a forward of it would search each time.
            searching = self.frozen is None and step.index is not None and made.forward_id == step.forward_id
            search = self.recipe.schedule.dense_refresh and searching
            if not search:
                call.plan = plan
                return self._run_sparse(call, plan, backend, learned, book), False
        return self._run_dense(call, "search step", dense if exact is None else lambda: exact, book), True

    def _run_sparse(
        self,
        call: AttentionCall,
        plan: AttentionPlan,
        backend: str,
        learned: Sequence[torch.Tensor] | None,
        book: LayerRecord,
    ) -> torch.Tensor:
        if self.observer is not None:
            self.observer(call)
        compensate, module = self.recipe.compensate, self.learned.get(call.layer)
        q, k, v, key_mask, scale = call.q, call.k, call.v, call.key_mask, call.scale

        def sparse() -> tuple[torch.Tensor, torch.Tensor]:
            return self.recipe.precision.attend(
                q, k, v, plan.mask, plan.rows, key_mask, scale, backend, with_lse=compensate.needs_lse
            )

        begin = self.sparse_time.start(q.device)
        out, witness = compensate.attend(q, k, v, plan, key_mask, scale, sparse)
        with torch.no_grad():
            book.nan_calls = book.nan_calls + witness.detach().isnan().any()
            book.density_sum = book.density_sum + compensate.density(plan)
        if module is not None and learned is None:
            out = module(out, q, k, v, plan, key_mask)
        elif module is not None and learned is not None:
            given = dict(zip((name for name, _ in module.named_parameters()), learned, strict=True))
            out = functional_call(module, given, (out, q, k, v, plan, key_mask))
        self.sparse_time.stop(begin, q.device)
        book.sparse_calls += 1
        return out

    def _searched_attention(self, call: AttentionCall) -> torch.Tensor | None:
        """Dense attention of a search step by this package's kernel, for its log-sum-exp, which the search needs:
        a pass of its own for that takes half as long as the attention itself. None where it is of no use."""
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
        mask = self._full_mask(call)
        backend, _ = choose_backend(call.q, call.k, call.v, mask, key_mask=call.key_mask)
        if backend == "reference":
            return None
        begin = self.dense_time.start(call.q.device)
        out, memory.lse = block_sparse_attention(
            call.q, call.k, call.v, mask, key_mask=call.key_mask, scale=call.scale, return_lse=True, backend=backend
        )
        self.dense_time.stop(begin, call.q.device)
        return out

    def _full_mask(self, call: AttentionCall) -> BlockMask:
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

    def _run_dense(
        self, call: AttentionCall, reason: str, dense: Callable[[], torch.Tensor], book: LayerRecord
    ) -> torch.Tensor:
        if self.observer is not None:
            self.observer(call)
        book.dense_calls[reason] += 1
        begin = self.dense_time.start(call.q.device)
        out = dense()
        self.dense_time.stop(begin, call.q.device)
        return out

    def _dense_reason(self, call: AttentionCall) -> str | None:
        if isinstance(self.recipe.select, DenseSelect):
            return "recipe is dense"
        if isinstance(call.layout, str):
            return call.layout
        if call.q.shape[2] != call.k.shape[2]:
            return f"grouped-query attention ({call.q.shape[2]} query and {call.k.shape[2]} key heads)"
        if call.layout.seq_len < self.min_tokens:
            return f"{call.layout.seq_len} tokens, too few to gain (below {self.min_tokens})"
        return self.recipe.schedule.dense_reason(call.step, call.layer, len(self.records))

    def _plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
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
            if keep and not (select.is_static and call.key_mask is not None):
                mask = mask.trimmed()
            if guarded and means is None:
                means = BlockMeans.of(q, k, call.key_mask, select.block)
            with self._timed("compensate", device):
                compensate = self.recipe.compensate
                state = compensate.prepare(prepared.blocks, mask, q, k, call.key_mask, call.scale, memory)
            if memory is not None:
                memory.found = None
        plan = AttentionPlan(rows=prepared.blocks.kernel_rows, mask=mask, compensation=state)
        if keep:
            self._plans[key] = _KeptPlan(call.step, plan, means, call.key_mask)
        book.plans_made += 1
        return call.step, plan

    def _plan_key(self, call: AttentionCall) -> tuple[Any, ...]:
        """Which calls may share a plan: of a static selection all layers of one order, steps and branches."""
        if self.recipe.select.is_static:
            return call.layout, call.q.device, self.recipe.order.variant(call.layer)
        return call.layer, call.step.branch, call.layout, call.q.shape[0], call.q.device

    @contextmanager
    def _timed(self, part: str, device: torch.device) -> Iterator[None]:
        begin = self.plan_parts[part].start(device)
        yield
        self.plan_parts[part].stop(begin, device)

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
            return kept[1]
        with torch.no_grad():
            prepared = self._prepare(call)
            mask = frozen.mask(call.layer, bucket, prepared.blocks, call.key_mask)
            q, k = call.q.detach(), call.k.detach()
            state = compensate.prepare(prepared.blocks, mask, q, k, call.key_mask, call.scale)
        plan = AttentionPlan(rows=prepared.blocks.kernel_rows, mask=mask, compensation=state)
        if call.key_mask is None:
            self._frozen_plans[place] = (version, plan)
        book.plans_made += 1
        return plan

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
        if last.index is None or step.index < last.index:
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

    def _choose_backend(self, call: AttentionCall, plan: AttentionPlan) -> str:
        q, permuted, hidden = call.q, plan.rows is not None, call.key_mask is not None
        key = (q.device, q.dtype, q.shape[-1], q.requires_grad, permuted, hidden, plan.mask.token_bits is None)
        if key not in self._backend_choice:
            name, reason = self.recipe.precision.choose_backend(
                q, call.k, call.v, plan.mask, plan.rows, call.key_mask, self.backend
            )
            self._backend_choice[key] = name
            self.backends_used[name] = reason
        return self._backend_choice[key]


def _spell(layout: TokenLayout | str) -> str:
    if isinstance(layout, str):
        return layout
    frames, height, width = layout.grid
    return f"a latent grid of {frames}x{height}x{width} from token {layout.latent_start} of {layout.seq_len}"


@contextmanager
def _autocast_done(call: AttentionCall) -> Iterator[None]:
    """Cast the call as autocast would for an attention kernel, and no autocast inside: plans stay exact."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device) or call.q.dtype == torch.float64:
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    call.q, call.k, call.v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
    with torch.autocast(device, enabled=False):
        yield


def _key_mask(attn_mask: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor | None, str | None]:
    """The bool ``[B, S]`` key mask that an attention mask stands for, or the reason why it is none."""
    if attn_mask is None:
        return None, None
    batch, seq_len = q.shape[:2]
    if attn_mask.dtype != torch.bool:
        return None, f"additive attention mask ({attn_mask.dtype})"
    if attn_mask.ndim == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1:
        attn_mask = attn_mask[:, 0, 0]
    if attn_mask.ndim == 2 and attn_mask.shape[1] == seq_len and attn_mask.shape[0] in (1, batch):
        return attn_mask.expand(batch, seq_len), None
    return None, f"attention mask of shape {tuple(attn_mask.shape)} is more than a key mask"
