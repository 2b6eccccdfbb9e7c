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

from .kernels import block_sparse_attention, choose_backend
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LayerMemory, SequenceBlocks
from .recipe import Recipe
from .stages.compensate import LearnedCompensation
from .stages.drift import BlockMeans
from .stages.select import Select
from .stages.select_static import DenseSelect
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


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """One attention call as an observer sees it: tensors (B, S, H, D) after norms and rotary embedding.

    Attributes:
        layout: of the sequence, or the reason why there is none.
        plan: of a sparse call; None where the call was dense.
    """

    layer: int
    step: StepContext
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    scale: float | None
    layout: TokenLayout | str
    plan: AttentionPlan | None


@dataclass(frozen=True, eq=False)
class _KeptPlan:
    """A plan, when it was made, and of which queries and keys where the schedule guards against drift."""

    made: StepContext
    plan: AttentionPlan
    means: BlockMeans | None


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
    """

    def __init__(self, recipe: Recipe, layer_names: list[str], backend: str, min_tokens: int) -> None:
        self.recipe = recipe
        self.backend = backend
        self.min_tokens = min_tokens
        self.records = [LayerRecord(name) for name in layer_names]
        self.plan_time = Stopwatch()
        self.sparse_time = Stopwatch()
        self.dense_time = Stopwatch()
        self.backends_used: dict[str, str] = {}
        self.observer: Callable[[ObservedCall], None] | None = None
        self.switched_on = True
        self.density: float | None = None
        self.output_tap: OutputTap | None = None
        self.learned: dict[int, LearnedCompensation] = {}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
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
        key_mask, reason = _key_mask(attn_mask, q)
        if q.shape[2] != k.shape[2]:
            reason = reason or f"grouped-query attention ({q.shape[2]} query and {k.shape[2]} key heads)"
        reason = reason or self._dense_reason(layer, layout, step)
        book = self.records[layer] if record else LayerRecord("")
        call = ObservedCall(layer, step, q, k, v, key_mask, scale, layout, None)
        if reason is not None:
            return self._dense(reason, book, call, dense)
        with _exact_dtypes(q, k, v) as (q, k, v):
            assert isinstance(layout, TokenLayout)
            begin = self.plan_time.start(q.device)
            made, plan = self._plan(layer, q, k, key_mask, scale, layout, step, book)
            backend = self._choose_backend(q, k, v, plan)
            self.plan_time.stop(begin, q.device)
            search = self.recipe.schedule.dense_refresh and made.forward_id == step.forward_id
            if not search:
                self._show(replace(call, plan=plan))
                out = self._sparse(layer, q, k, v, plan, key_mask, scale, backend, book, learned)
        if search:
            return self._dense("search step", book, call, dense)
        return out if self.output_tap is None else self.output_tap(layer, out, dense)

    def _sparse(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        key_mask: torch.Tensor | None,
        scale: float | None,
        backend: str,
        book: LayerRecord,
        learned: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        begin = self.sparse_time.start(q.device)
        result = block_sparse_attention(
            q,
            k,
            v,
            plan.mask,
            rows=plan.rows,
            key_mask=key_mask,
            scale=scale,
            return_lse=backend == "triton",
            backend=backend,
        )
        # Where the kernel has the log-sum-exp at hand it shows a NaN at a hundredth of the bytes.
        out, witness = result if isinstance(result, tuple) else (result, result)
        with torch.no_grad():
            book.nan_calls = book.nan_calls + witness.detach().isnan().any()
            book.density_sum = book.density_sum + plan.mask.density()
        module = self.learned.get(layer)
        if module is not None and learned is None:
            out = module(out, q, k, v, plan, key_mask)
        elif module is not None and learned is not None:
            given = dict(zip((name for name, _ in module.named_parameters()), learned, strict=True))
            out = functional_call(module, given, (out, q, k, v, plan, key_mask))
        self.sparse_time.stop(begin, q.device)
        book.sparse_calls += 1
        return out

    def _dense(
        self, reason: str, book: LayerRecord, call: ObservedCall, dense: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        self._show(call)
        book.dense_calls[reason] += 1
        begin = self.dense_time.start(call.q.device)
        out = dense()
        self.dense_time.stop(begin, call.q.device)
        return out if self.output_tap is None else self.output_tap(call.layer, out, None)

    def forget(self) -> None:
        """Drop every plan, memory and cached table."""
        self._plans.clear()
        self._memories.clear()
        self._prepared.clear()

    def _show(self, call: ObservedCall) -> None:
        if self.observer is not None:
            self.observer(call)

    def _dense_reason(self, layer: int, layout: TokenLayout | str, step: StepContext) -> str | None:
        if isinstance(self.recipe.select, DenseSelect):
            return "recipe is dense"
        if isinstance(layout, str):
            return layout
        if layout.seq_len < self.min_tokens:
            return f"{layout.seq_len} tokens, too few to gain (below {self.min_tokens})"
        return self.recipe.schedule.dense_reason(step, layer, len(self.records))

    def _plan(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        layout: TokenLayout,
        step: StepContext,
        book: LayerRecord,
    ) -> tuple[StepContext, AttentionPlan]:
        """The plan of a call, and when it was made."""
        select, schedule = self._selection(step), self.recipe.schedule
        static = select.is_static and not self.recipe.compensate.is_dynamic
        prepared = self._prepare(layout, q.device, layer, q.shape[2])
        if static:
            # One plan serves all layers of one order; a prompt's padding can change it, so it is kept only
            # without any.
            key: tuple[Any, ...] = (layout, q.device, self.recipe.order.variant(layer))
            keep = key_mask is None
        else:
            key = (layer, step.branch, layout, q.shape[0], q.device)
            keep = schedule.keeps_plans
        kept = self._plans.get(key) if keep else None
        guarded = keep and schedule.drift_bound is not None and not static
        means = None
        with torch.no_grad():
            if kept is not None and (static or not schedule.needs_plan(step, kept.made)):
                if kept.means is None or step.forward_id == kept.made.forward_id:
                    return kept.made, kept.plan
                means = BlockMeans.of(q.detach(), k.detach(), key_mask, select.block)
                assert schedule.drift_bound is not None
                if bool(means.change_since(kept.means) <= schedule.drift_bound):
                    return kept.made, kept.plan
            memory = None if static else self._memory(key, step)
            mask = select.select(
                prepared.blocks, prepared.tables, q.detach(), k.detach(), key_mask, scale, memory
            )
            negligible = self.recipe.compensate.negligible(prepared.blocks, q.detach(), k.detach(), key_mask)
            if guarded and means is None:
                means = BlockMeans.of(q.detach(), k.detach(), key_mask, select.block)
        plan = AttentionPlan(prepared.blocks.kernel_rows, mask, negligible)
        if keep:
            self._plans[key] = _KeptPlan(step, plan, means)
        book.plans_made += 1
        return step, plan

    def _selection(self, step: StepContext) -> Select:
        """The recipe's selection with the density that its schedule asks for at this step."""
        select = self.recipe.select
        assert not isinstance(select, DenseSelect)
        density = self.recipe.schedule.density(step) if self.density is None else self.density
        return select if density is None else replace(select, density=density)  # type: ignore[type-var]

    def _memory(self, key: tuple[Any, ...], step: StepContext) -> LayerMemory:
        """The layer's memory of this run: empty in a new run, and always without a pipeline."""
        if step.index is None:
            return LayerMemory()
        last, memory = self._memories.get(key, (step, LayerMemory()))
        if last.index is None or step.index < last.index:
            memory = LayerMemory()
        self._memories[key] = (step, memory)
        return memory

    def _prepare(self, layout: TokenLayout, device: torch.device, layer: int, heads: int) -> _Prepared:
        key = (layout, device, self.recipe.order.variant(layer))
        # Two threads may run one transformer; the tables are built once.
        with self._lock:
            if key not in self._prepared:
                select = self.recipe.select
                assert not isinstance(select, DenseSelect)
                rows = self.recipe.order.rows(layout, device, layer)
                if rows is not None and rows.dim() == 2 and rows.shape[0] not in (1, heads):
                    raise ValueError(
                        f"The order of layer {layer} is for {rows.shape[0]} heads, the layer has {heads}."
                    )
                blocks = SequenceBlocks(layout, rows, *select.block, device)
                self._prepared[key] = _Prepared(blocks, select.prepare(blocks))
            return self._prepared[key]

    def _choose_backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> str:
        key = (q.device, q.dtype, q.shape[-1], q.requires_grad)
        if key not in self._backend_choice:
            name, reason = choose_backend(q, k, v, plan.mask, backend=self.backend)
            self._backend_choice[key] = name
            self.backends_used[name] = reason
        return self._backend_choice[key]


@contextmanager
def _exact_dtypes(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """What autocast would hand to an attention kernel, and no autocast inside: plans stay exact."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        yield tensors
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield tuple(tensor.to(dtype) for tensor in tensors)


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
