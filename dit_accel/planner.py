"""Plans of a transformer's attention calls: made by the stages of a recipe, and kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .call import AttentionCall
from .graph_hold import GraphHold
from .kept_plans import KeptPlan, kept_of, memory_of, plan_key
from .kernels import BlockMask
from .kernels.common.capability import choose_selection
from .kernels.common.choice import Case, Choice, Operation, refusal
from .kernels.mask.packed import PackedBlockMask
from .kernels.mask.pairs import PairMask
from .kernels.mask.token_bits import WORD_BITS
from .layout import StepContext, TokenLayout
from .layout_tables import LayoutTables, Prepared
from .plan import AttentionPlan, LayerMemory, LeftOut, SequenceBlocks
from .recipe import Recipe
from .records import LayerRecord
from .ring import RingPart, RingShard
from .stages.compensate.protocol import Compensation
from .stages.drift import BlockMeans
from .stages.select.protocol import Select
from .timing import Stopwatch


class PlanSource(NamedTuple):
    """What decides a call's plan where no earlier call of its run does.

    Attributes:
        choice: equal where a call of the same layout, at another step, has a plan by the same rule.
        anew: whether each call makes a plan of its own, of its queries and keys; else equal choices are the same plan.
    """

    choice: object
    anew: bool


def why_not_of_one_call(recipe: Recipe) -> str | None:
    """Why plans that are made at every step follow from more than queries, keys and density of one call each, a
    sentence without its end; None where they do not."""
    if recipe.schedule.dense_refresh:
        return "this recipe makes a plan at every step, and such a step is dense"
    if recipe.order.follows_call:
        return "this recipe makes a plan at every step, and an order of tokens"
    if recipe.select.head_densities:
        return "this recipe makes a plan at every step, with densities by head, which the host hands over"
    if not recipe.select.of_call_alone:
        return "this recipe makes a plan at every step, which may follow from the one before"
    return None


class Planner:
    """Plans under one recipe. What a layout needs stays here; what a run made stays with the run of the call.

    Attributes:
        tables: of the layouts.
        density: in place of the selection's own and the schedule's, while a training anneals it.
        of_graphs: what CUDA graphs read of runs and layouts.
        parts: time of making plans: "order" (and what a layout needs once), "select", "compensate".
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.density: float | None = None
        self.parts = {part: Stopwatch() for part in ("order", "select", "compensate")}
        self.of_graphs = GraphHold()
        self.tables = LayoutTables(recipe, self.parts["order"], self.of_graphs)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backend of each operation that calls of a case run, as far as the case tells.

        Raises:
            ValueError: the backend was named and cannot run one of them.
        """
        recipe = self.recipe
        if recipe.select.is_dense:
            return {}
        case = case._replace(blocks=recipe.select.block, permuted=recipe.order.permutes)
        # Every plan is lists of blocks, also one from a calibration.
        found: dict[Operation, Choice] = {"selection": choose_selection(case, backend)}
        found |= self._selection_choices(case, backend)
        found |= recipe.compensate.choices(case, backend)
        if not recipe.compensate.attends_alone:
            found |= recipe.precision.choices(case, backend)
        elif backend == "fa4":
            alone = type(recipe.compensate).__name__
            raise refusal("attention", backend, f"{alone} attends by itself, and fa4 is for attention to kept blocks")
        return found

    def source(self, step: StepContext, layer: int, layout: TokenLayout) -> PlanSource | None:  # noqa: ARG002
        """What decides the plan of a layer's call at a step; None where an earlier call of its run has a part in it."""
        select = self.recipe.select
        if select.is_static:
            return PlanSource(self._selection(step, layer), anew=False)
        if self.recipe.schedule.keeps_plans or why_not_of_one_call(self.recipe) is not None:
            return None
        return PlanSource(self._selection(step, layer), anew=True)

    def pad(self, call: AttentionCall) -> None:
        """Give a call the padding that the order expects."""
        assert isinstance(call.layout, TokenLayout)
        count = self.recipe.order.padding(call.layout)
        if count:
            call.pad(count, self.tables.padding(call, count))

    @property
    def goes_round(self) -> bool:
        """Whether processes around a ring can plan together."""
        return self.recipe.select.is_static or self.recipe.select.goes_round

    def deal(self, call: AttentionCall) -> None:
        """Exchange a call's tokens with the other processes of its ring for those of this process' slots.

        Raises:
            ValueError: there are fewer blocks than processes, or keys are hidden and each head has an order of its own.
        """
        ring = call.ring
        assert ring is not None
        with torch.no_grad(), torch.inference_mode(False):
            prepared = self.tables.prepare(call)
            part = prepared.parts.get(ring.key)
            if part is None:
                with self.parts["order"].timing(call.q.device):
                    part = prepared.parts[ring.key] = self._part(ring, prepared.blocks)
            if call.key_mask is not None and part.slots is not None and part.slots.dim() > 1:
                raise ValueError(
                    "Under ring attention an order per head knows no mask of keys: use ulysses_degree in place of "
                    "ring_degree, or an order that heads share."
                )
        call.deal(part)

    def _part(self, ring: RingShard, blocks: SequenceBlocks) -> RingPart:
        work = torch.ones(blocks.num_blocks[0])
        if blocks.forced_q is not None:
            # Others keep a share of what rows of text read; where a rule decides, about what it mostly does.
            select = self.recipe.select
            shares = [share for layer in select.head_densities for share in layer] or [select.density or 0.3]
            work[blocks.forced_q[0, 0].cpu()] = len(shares) / sum(shares)
        sizes = (blocks.block_q, blocks.block_k)
        return RingPart.of(ring, blocks.rows, work, sizes, blocks.device, blocks.layout.padding)

    def plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        """The plan of a call, and when it was made."""
        if torch.is_inference_mode_enabled():
            # Plans and tables outlive the call, and a training may save for its backward what a validation made.
            with torch.inference_mode(False):
                return self.plan(call, book)
        found = self._plan(call, book)
        if call.captured:
            self._hold(call)
        return found

    def _hold(self, call: AttentionCall) -> None:
        """Keep, for as long as the patch, what a graph that is captured may read of its run in its replays."""
        if not call.run.knows(call.mask):
            return
        kept = kept_of(call)
        read = list(kept.plans.values())
        for memory in kept.memories.values():
            read += [memory.lse, memory.base, memory.left_out]
        self.of_graphs.add(read)

    def _plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        if call.repeated and call.layer in call.used:
            kept = call.used[call.layer]
            return kept.made, kept.plan
        select = self._selection(call.step, call.layer)
        return self._static_plan(call, select, book) if select.is_static else self._dynamic_plan(call, select, book)

    def _static_plan(self, call: AttentionCall, select: Select, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        """A plan that all layers of one order, steps and branches share."""
        with torch.no_grad():
            prepared = self.tables.prepare(call)
            if call.mask is None:
                plans: dict[Any, Any] = prepared.plans
                if call.captured:
                    plans = dict(plans)  # see kept_of
                key: Any = select
            else:
                plans = kept_of(call).plans
                key = (select, call.q.device, self.recipe.order.variant(call.layer))
            if key not in plans:
                mask, state = self._make(call, select, prepared, None)
                # A mask of one prompt's hidden keys lives for a run: not worth waiting for the device to trim it.
                kept_mask: BlockMask | PackedBlockMask = (
                    mask if call.mask is not None else mask.trimmed().for_many_calls()
                )
                if select.per_head and mask.token_bits is None:
                    # One for each layer, as those that follow the call.
                    kept_mask = PackedBlockMask.of(mask, call.key_mask is not None, call.backend("selection"))
                plans[key] = KeptPlan(call.step, prepared.blocks.kernel_rows, kept_mask, state, mask.density())
                book.plans_made += 1
        return plans[key].made, plans[key].plan

    def _dynamic_plan(
        self, call: AttentionCall, select: Select, book: LayerRecord
    ) -> tuple[StepContext, AttentionPlan]:
        """A plan of this layer and branch, which a schedule may keep for later forwards of the run."""
        schedule = self.recipe.schedule
        keep = schedule.keeps_plans and not call.repeated
        plans = kept_of(call).plans if keep else {}
        key = plan_key(call)
        if keep:
            self._count_forwards(call)
        kept = plans.get(key)
        if kept is not None and self.serves_at_once(kept, call.step):
            return self._reused(call, kept)
        means = None
        with torch.no_grad():
            if kept is not None and not schedule.needs_plan(call.step, kept.made):
                if schedule.chooses_anew(call.step, kept.chosen or kept.made):
                    return self._chosen_anew(call, select, kept, book)
                if kept.means is None or call.step.forward_id == kept.made.forward_id:
                    return self._reused(call, kept)
                means = BlockMeans.of(call, select.block)
                assert schedule.drift_bound is not None
                if bool(means.change_since(kept.means, call) <= schedule.drift_bound):
                    return self._reused(call, kept)
            memory = memory_of(call)
            memory.keeps_base = schedule.choose_every > 0 and keep
            prepared = self.tables.prepare(call)
            mask, state = self._make(call.with_keys(prepared.keys), select, prepared, memory)
            memory.found = None
            if not schedule.plans_after(call.step):
                memory.lse = None
            if keep and schedule.drift_bound is not None and means is None:
                means = BlockMeans.of(call, select.block)
        book.plans_made += 1
        plan = AttentionPlan(prepared.blocks.kernel_rows, mask, state, keys=prepared.keys)
        if keep and not call.captured:
            call.used[call.layer] = plans[key] = KeptPlan.of(call, plan, means)
        return call.step, plan

    def serves_at_once(self, kept: KeptPlan, step: StepContext) -> bool:
        """Whether the steps alone say that a kept plan serves a call at ``step`` as it is."""
        schedule = self.recipe.schedule
        if kept.means is not None or schedule.needs_plan(step, kept.made):
            return False
        return not schedule.chooses_anew(step, kept.chosen or kept.made)

    @staticmethod
    def _count_forwards(call: AttentionCall) -> None:
        """Tell a call in how many forwards its layer ran before, by which the age of a plan counts: another package's
        cache may skip some blocks of a forward, and tells nobody."""
        if call.step.index is not None and call.step.computed is None:
            call.step = kept_of(call).aged(call.step, plan_key(call))

    def _chosen_anew(
        self, call: AttentionCall, select: Select, kept: KeptPlan, book: LayerRecord
    ) -> tuple[StepContext, AttentionPlan]:
        """A kept plan with blocks chosen for this call from what its search found; it keeps its age."""
        memory = memory_of(call)
        if memory.base is None:
            return self._reused(call, kept)
        if self.recipe.order.follows_call:
            assert isinstance(call.layout, TokenLayout)
            prepared = Prepared(SequenceBlocks(call.layout, kept.rows, *select.block, call.q.device), None, kept.keys)
        else:
            prepared = self.tables.prepare(call)
        mask, state = self._make(call.with_keys(prepared.keys), select, prepared, memory, anew=True)
        memory.found = None
        book.plans_made += 1
        plan = AttentionPlan(prepared.blocks.kernel_rows, mask, state, keys=prepared.keys)
        if not call.captured:
            chosen = replace(KeptPlan.of(call, plan), made=kept.made, chosen=call.step)
            call.used[call.layer] = kept_of(call).plans[plan_key(call)] = chosen
        return kept.made, plan

    @staticmethod
    def _reused(call: AttentionCall, kept: KeptPlan) -> tuple[StepContext, AttentionPlan]:
        call.used[call.layer] = kept
        return kept.made, kept.plan

    def _make(
        self,
        call: AttentionCall,
        select: Select,
        prepared: Prepared,
        memory: LayerMemory | None,
        anew: bool = False,
    ) -> tuple[BlockMask, Any]:
        """A block mask, and what the compensation works out for it; ``anew``: from what a search found."""
        with self.parts["select"].timing(call.q.device):
            # Before the selection, whose scores and numbers are of what is seen.
            call.seen = self._cut(call, prepared)
            try:
                if anew:
                    assert memory is not None
                    mask = select.choose_anew(prepared.blocks, call, memory)
                else:
                    mask = select.select(prepared.blocks, prepared.tables, call, memory)
                mask = self._shown(call, prepared, mask)
            finally:
                call.seen = None
        compensate = self.recipe.compensate
        if type(compensate).prepare is Compensation.prepare:  # which makes nothing: two events of the host saved
            return mask, None
        with self.parts["compensate"].timing(call.q.device):
            state = compensate.prepare(prepared.blocks, mask, call, memory)
        return mask, state

    def _cut(self, call: AttentionCall, prepared: Prepared) -> PairMask | None:
        """The call's mask of token pairs, by the blocks of a plan."""
        if call.pairs is None:
            return None
        blocks = prepared.blocks
        cut = partial(PairMask.of, call.pairs, blocks.kernel_rows, blocks.block_q, blocks.block_k)
        if self.recipe.order.follows_call:
            return cut()  # of this call's order
        # Layers that share an order share this.
        place = ("pairs", call.q.device, self.recipe.order.variant(call.layer))
        kept = kept_of(call).plans
        found: PairMask = kept.get(place) or cut()
        kept[place] = found
        return found

    @staticmethod
    def _shown(call: AttentionCall, prepared: Prepared, mask: BlockMask) -> BlockMask:
        """A mask without the token pairs that the call hides, and without rows of tokens that do not query."""
        if call.seen is None:
            querying = prepared.blocks.querying_q
            return mask if querying is None else mask.for_queries(querying)
        return call.seen.over(mask, call.backend("selection"))

    def refuse(self, call: AttentionCall) -> None:
        """Raise where no plan can be made of a call like this: also at a step that needs none, before the work."""

    def why_not_pairs(self) -> str | None:
        """Why calls stay dense whose queries may see different keys; None where they need not."""
        compensate, size = self.recipe.compensate, self.recipe.select.block[1]
        if not compensate.allows_pairs:
            return f"{type(compensate).__name__} cannot tell which blocks a mask of token pairs leaves out"
        if size % WORD_BITS:
            return f"a mask of token pairs needs key blocks of a multiple of {WORD_BITS} tokens, got {size}"
        return None

    def is_search(self, call: AttentionCall, made: StepContext) -> bool:
        """Whether a plan made at ``made`` is of a search in this very forward, whose attention the recipe has dense.

        Static plans have such a step where the compensation watches it.
        """
        schedule, compensate = self.recipe.schedule, self.recipe.compensate
        if not schedule.searches_densely(call.step):
            return False
        if not self.recipe.select.is_static:
            return made.forward_id == call.step.forward_id
        if not compensate.watches_dense or call.repeated:
            return False
        kept = memory_of(call).left_out
        return kept is None or schedule.needs_plan(call.step, kept.made)

    def left_out(self, call: AttentionCall) -> LeftOut | None:
        """What the last dense step of the call's layer and branch kept for the compensation."""
        return memory_of(call).left_out if self.recipe.compensate.watches_dense else None

    def keep_left_out(self, call: AttentionCall, left_out: LeftOut) -> None:
        """Keep it for later calls of the same run."""
        memory_of(call).left_out = left_out

    def memory_of_search(self, call: AttentionCall) -> LayerMemory | None:
        """Where a coming search looks for the log-sum-exp of its step's attention; None where none is of use."""
        schedule, select = self.recipe.schedule, self.recipe.select
        if not schedule.searches_densely(call.step) or call.pairs is not None:
            return None
        assert isinstance(call.layout, TokenLayout)
        if not select.uses_lse(call.layout, call.key_mask):
            return None
        if schedule.keeps_plans and not call.repeated:
            self._count_forwards(call)  # as the plan will: what is found for a search that does not come would stay
        kept = kept_of(call).plans.get(plan_key(call))
        if kept is not None and not schedule.needs_plan(call.step, kept.made):
            return None
        if any(x.requires_grad for x in (call.q, call.k, call.v)):
            return None
        memory = memory_of(call)
        return memory if memory.lse is None else None

    def forget(self) -> None:
        """Drop every cached table; plans are dropped with their runs."""
        self.tables.clear()
        self.of_graphs.clear()

    def _selection_choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backends of the recipe's own selection; see :meth:`choices`."""
        return self.recipe.select.choices(case, backend)

    def _selection(self, step: StepContext, layer: int) -> Select:
        """The recipe's selection with the density that holds for a layer at a step."""
        select = self.recipe.select
        density = self.recipe.schedule.density(step) if self.density is None else self.density
        return select.of_layer(layer) if density is None else select.with_density(density)
