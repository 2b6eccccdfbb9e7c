"""One attention call under a recipe: dense or sparse, with which plan, and what it cost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from .call import AttentionCall, autocast_done, dtype_of_attention
from .dense_kernel import DENSE, SEARCH, keeps_up_with_dense, kernel_over_all
from .kept_attention import attend_kept
from .kernels.attention.means import LeftOutMeans
from .kernels.common.choice import Case, Choice, Operation, case_of
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan
from .planner import Planner
from .recipe import Recipe
from .records import BackendsUsed, LayerRecord, SharedWork, Shares
from .ring_attention import shares_of_work
from .run import Run
from .stages.compensate.protocol import Attended
from .stages.learned_layer import LearnedLayer
from .stages.schedule import DENSE_PHASE
from .step_log import Placed, StepLog
from .timing import Moment, Stopwatch
from .worthwhile import why_not_worthwhile

logger = logging.getLogger("dit_accel")

# A server sees any number of sizes; advice about this many is enough.
MOST_ADVISED = 64

# To turn gradients off where they are off costs the host more than to ask.
_AS_IT_IS = nullcontext()

# Sees layer, output and the model's own attention of a call (None where that is the output already); what it
# returns takes the output's place.
OutputTap = Callable[[int, torch.Tensor, Callable[[], torch.Tensor] | None], torch.Tensor]


class Engine:
    """Attention of one transformer under one recipe.

    Args:
        recipe: what to do.
        layer_names: the self-attention modules, in order of execution.
        backend: of every operation, one of :data:`~dit_accel.kernels.BACKENDS`.
        min_tokens: sequence length from which sparse attention gains on a GPU. On a CPU it gains from
            :data:`~dit_accel.worthwhile.LEAST_ON_CPU` on, if that is less.
        automatic: stay dense below ``min_tokens`` and where most pairs must be read in any case; else only say so.

    Attributes:
        switched_on: False lets every call through to the model's own attention, uncounted.
        planner: of the plans of sparse calls.
        output_tap: sees, and may replace, every output; for losses on attention outputs.
        learned: learned compensation of each layer by index; empty for recipes without parameters.
        routers: what a learned selection has in each layer by index; likewise.
        backends_used: which backends ran each operation so far, and why.
        notes: what a user should know of the calls so far, a sentence each, in the order of events, and whether it
            outlives :meth:`reset`.
        parallel: how processes shared the calls, a sentence each; empty in one process.
        left_alone: paths of the model's other attention modules, for the summary.
        shared: what the processes kept, that shared the sparse calls.
        run: for the calls of an engine that is used without a session.
        steps: what each step did; None while nobody records it.
    """

    def __init__(
        self, recipe: Recipe, layer_names: list[str], backend: str, min_tokens: int, automatic: bool = False
    ) -> None:
        self.recipe = recipe
        self.backend = backend
        self.min_tokens = min_tokens
        self.automatic = automatic
        self.planner = Planner(recipe)
        self.records = [LayerRecord(name) for name in layer_names]
        self.plan_time = Stopwatch()
        self.sparse_time = Stopwatch()
        self.dense_time = Stopwatch()
        self.backends_used = BackendsUsed()
        self.observer: Callable[[AttentionCall], None] | None = None
        self.switched_on = True
        self.output_tap: OutputTap | None = None
        self.learned: dict[int, LearnedLayer] = {}
        self.routers: dict[int, LearnedLayer] = {}
        self.notes: dict[str, bool] = {}
        self.left_alone: tuple[str, ...] = ()
        self.parallel: dict[str, None] = {}
        self.shared = SharedWork()
        self.run = Run()
        self.steps: StepLog | None = None
        self._choices: dict[Case, dict[Operation, Choice]] = {}
        self._allowed: set[tuple[torch.device, torch.dtype | None, int | None, bool]] = set()
        self._attention_choices: dict[Case, Choice] = {}
        self._seen_layouts: set[tuple[TokenLayout, torch.device]] = set()
        # Threads that share a transformer count in the same records.
        self._counting = threading.Lock()

    def attend(
        self,
        call: AttentionCall,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of a call, (B, S, H, D).

        Args:
            dense: the model's own attention for this very call.
            learned: parameters to use in place of the layer's own, in the order of ``parameters()``: a
                compiled graph hands them in so that they get their gradients. Where they read the layer's input, in
                their place what they made of it.

        Raises:
            ValueError: the backend was named and cannot run an operation of the recipe; nothing has run then.
        """
        if not self.switched_on:
            out = dense()
            return out if self.output_tap is None else self.output_tap(call.layer, out, None)
        if self.backend != "auto":  # which takes what runs
            q = call.q
            self._refuse(q.device, dtype_of_attention(q.device, q.dtype), q.shape[-1], call.key_mask is not None)
        # Another thread may end the recording meanwhile.
        steps = self.steps if call.is_counted else None
        begun = None if steps is None else steps.start(call.q.device)
        out, was_dense = self._attend(call, dense, learned)
        if steps is not None:
            steps.end_attention(call, begun, call.q.device)
        return out if self.output_tap is None else self.output_tap(call.layer, out, None if was_dense else dense)

    def refuse_backend(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Raise where the named backend cannot run an operation of the recipe on a device; cheap to repeat.

        Args:
            dtype: that the model computes in, before autocast; None where it is not known.

        Raises:
            ValueError: names the operation, the backend and the reason.
        """
        if not self.switched_on:
            return
        if dtype is not None:
            # Stored weights may be integers; what they are computed in is then not known.
            dtype = dtype_of_attention(device, dtype) if dtype.is_floating_point else None
        self._refuse(device, dtype)

    def pass_by(
        self, layer: int, reason: str, dense: Callable[[], torch.Tensor], at: Placed | None = None
    ) -> torch.Tensor:
        """A call that no plan can serve, by the model's own attention, counted with the reason."""
        if not self.switched_on:
            return dense()
        self.count_dense(layer, reason, at)
        return dense()

    def count_dense(self, layer: int, reason: str, at: Placed | None = None) -> None:
        """Count a call of this layer that was not sparse, in the forward ``at`` where one is known."""
        with self._counting:
            self.records[layer].dense_calls[reason] += 1
        steps = self.steps
        if steps is not None and at is not None:
            steps.add_dense(at, reason)

    def count_replayed(self, layer: int, shares: Shares, plans_made: int, at: Placed) -> None:
        """Count a sparse call that a CUDA graph computed, in the forward ``at``. NaNs in its output are counted by the
        graph, where the layer's record has a place for them."""
        with self._counting:
            record = self.records[layer]
            record.add_sparse(shares)
            record.replayed_calls += 1
            record.plans_made += plans_made
        steps = self.steps
        if steps is not None:
            steps.add_plans(at, plans_made)
            steps.add_sparse(at, shares.density)

    def reset(self) -> None:
        """Forget what was counted, timed and noted so far. Plans and tables stay: nothing runs otherwise after it."""
        with self._counting:
            for record in self.records:
                record.reset()
            for watch in (self.plan_time, self.sparse_time, self.dense_time, *self.planner.parts.values()):
                watch.reset()
            self.backends_used, self.shared = BackendsUsed(), SharedWork()
            self.notes = {sentence: lasting for sentence, lasting in self.notes.items() if lasting}
            self._seen_layouts.clear()
        if self.steps is not None:
            self.steps.clear()

    def note(self, sentence: str, lasting: bool = False) -> None:
        """Keep a sentence for the summary; it is logged once, as a warning.

        Args:
            lasting: it is true whatever runs, and outlives :meth:`reset`.
        """
        with self._counting:
            is_new = sentence not in self.notes
            self.notes[sentence] = lasting
        if is_new:
            logger.warning(sentence)

    def _attend(
        self,
        call: AttentionCall,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, bool]:
        """The output, and whether it is the model's own attention's."""
        book = self.records[call.layer] if call.is_counted else LayerRecord("")
        reason = call.dense_reason = call.unread or self._dense_reason(call)
        if reason == DENSE_PHASE and self.recipe.schedule.own_dense:
            dense = self._dense_by_kernel(call, dense)
        if reason is not None:
            return self._run_dense(call, reason, dense, book), True
        with autocast_done(call):
            call.repeat_heads()
            call.spread_queries()
            router = self.routers.get(call.layer)
            call.router = None if router is None else router.among(call.heads)
            self.planner.pad(call)
            call.backends_used = self.backends_used
            call.choices = self._choices_of(case_of(call.q, call.k, call.v, key_mask=call.key_mask))
            if call.ring is not None:
                self.planner.deal(call)
            exact = self._searched_attention(call)
            begin, before = self.plan_time.start(call.q.device), book.plans_made
            made, plan = self._plan(call, book)
            # A kept plan takes no time worth an event, which costs the host more.
            planned = begin if book.plans_made == before else self.plan_time.stop(begin, call.q.device)
            if not self.planner.is_search(call, made):
                call.plan = plan
                call.left_out = self.planner.left_out(call)
                return call.of_queries(self._run_sparse(call, plan, learned, book, planned)), False
        out = self._run_dense(call, "search step", dense if exact is None else lambda: call.of_queries(exact), book)
        if self.recipe.compensate.watches_dense:
            self._watch(call, plan, out)
        return out, True

    def _watch(self, call: AttentionCall, plan: AttentionPlan, dense: torch.Tensor) -> None:
        """Let the compensation compare a dense step with what the plan of that step would have given."""
        with torch.no_grad(), torch.inference_mode(False), autocast_done(call):
            begin = self.sparse_time.start(call.q.device)
            call = call.with_keys(plan.keys)
            left_out = self.recipe.compensate.left_out(call, plan, dense, partial(self._attend_kept, call, plan))
            self.sparse_time.stop(begin, call.q.device)
            self.planner.keep_left_out(call, left_out)

    def _attend_kept(self, call: AttentionCall, plan: AttentionPlan, means: LeftOutMeans | None = None) -> Attended:
        """Attention over the kept blocks, wherever they are, and over means where a compensation hands them over."""
        precision, with_lse = self.recipe.precision, self.recipe.compensate.needs_lse
        return attend_kept(call, plan, precision, self._attention_backend, with_lse, means)

    def _plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        steps = self.steps
        if steps is None or not call.is_counted:
            return self.planner.plan(call, book)
        own = LayerRecord("")  # other threads count in the layer's
        found = self.planner.plan(call, own)
        with self._counting:
            book.plans_made += own.plans_made
        steps.add_plans(call, own.plans_made)
        return found

    def _run_sparse(
        self,
        call: AttentionCall,
        plan: AttentionPlan,
        learned: Sequence[torch.Tensor] | None,
        book: LayerRecord,
        begin: Moment,
    ) -> torch.Tensor:
        if self.observer is not None:
            self.observer(call)
            begin = self.sparse_time.start(call.q.device)
        compensate, module = self.recipe.compensate, self.learned.get(call.layer)
        if compensate.reads_input:
            if not learned:
                raise RuntimeError(
                    f"{type(compensate).__name__} needs the input of layer {call.layer}, which its hook has not seen."
                )
            call.take_gate(learned[0])
            module = None
        plan = call.plan = compensate.narrow(call, plan)
        moved = call.with_keys(plan.keys)
        out, witness = compensate.attend(moved, plan, partial(self._attend_kept, moved, plan))
        if not call.captured:  # a graph's tensors are its own, and what they hold changes with a replay
            with torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS:
                self._count(call, plan, witness, book)
        elif (nans := self.records[call.layer].replayed_nans.get(call.q.device)) is not None:
            nans += witness.isnan().any()
        if module is not None:
            out = module.among(call.heads, learned)(out, moved, plan)
        self.sparse_time.stop(begin, call.q.device)
        return out

    def _count(self, call: AttentionCall, plan: AttentionPlan, witness: torch.Tensor, book: LayerRecord) -> None:
        """Record a sparse call: what it kept, and whether its output holds a NaN."""
        largest, shares = witness.amax(), self.shares_of(call, plan)  # NaN where one is
        with self._counting:
            book.add_sparse(shares)
            book.largest.add(largest)
        steps = self.steps
        if steps is not None and call.is_counted:
            steps.add_sparse(call, shares.density)

    def shares_of(self, call: AttentionCall, plan: AttentionPlan) -> Shares:
        """What a call computes under a plan; where processes share the call, what the others have is recorded."""
        density = self._density(call, plan)
        # A mask of tokens within blocks sees less than the blocks that it keeps. Around a ring it is not told.
        hides = plan.mask.token_bits is not None and call.part is None
        seen = plan.mask.token_density if hides else None
        if isinstance(call.layout, TokenLayout) and call.layout.queries is not None:
            density = density / plan.querying  # of the rows of blocks that query
            seen = None if seen is None else seen / plan.querying
        return Shares(density, seen)

    def _density(self, call: AttentionCall, plan: AttentionPlan) -> torch.Tensor:
        """This process' share of the work of dense attention, a 0-d tensor; that of the others is recorded."""
        density = plan.work(self.recipe.compensate.density)
        if call.heads is None and call.part is None:
            return density
        if call.part is None:
            each, rows = density[None], [plan.mask.num_blocks[0]]
        else:
            rows = call.part.q_counts
            each = self.recipe.compensate.work(shares_of_work(call, plan), plan)
            density = each[call.part.ring.rank]
        pairs = torch.tensor(rows, device=each.device, dtype=each.dtype)
        if call.heads is not None:
            heads = torch.tensor(call.heads.numbers, device=each.device, dtype=each.dtype)
            # The ranks of a mesh of rings: first those that share a ring's place.
            each, pairs = call.heads.of_ranks(each).T.flatten(), (pairs[:, None] * heads).flatten()
        if not call.repeated:
            with self._counting:
                self.shared.add(each, pairs)
        return density

    def _searched_attention(self, call: AttentionCall) -> torch.Tensor | None:
        """Dense attention of a search step by this package's kernel, for its log-sum-exp, which the search needs:
        a pass of its own for that takes half as long as the attention itself. None where it is of no use."""
        memory = self.planner.memory_of_search(call)
        if memory is None:
            return None
        choice, kernel = kernel_over_all(call, self.planner.tables, self.backend, SEARCH)
        # In torch the model's own attention is several times faster over all blocks, and the search's own pass cheap.
        if choice.name in ("reference", "torch"):
            return None
        self.backends_used.add(SEARCH, choice)
        begin = self.dense_time.start(call.q.device)
        out, memory.lse = kernel()
        self.dense_time.stop(begin, call.q.device)
        return out

    def _dense_by_kernel(self, call: AttentionCall, dense: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """This package's kernel for a step of the dense phase where it keeps up with the model's own attention."""
        if call.pairs is not None or call.ring is not None or call.k.shape != call.v.shape:
            return dense
        if case_of(call.q, call.k, call.v).recorded:
            return dense
        own = replace(call)  # observers see a dense call as it was given, and nothing holds copies that no kernel reads
        with autocast_done(own):
            own.repeat_heads()
            own.spread_queries()
            own.choices = self._choices_of(case_of(own.q, own.k, own.v, key_mask=own.key_mask))  # of the mask
            choice, kernel = kernel_over_all(own, self.planner.tables, self.backend, DENSE)
        if not keeps_up_with_dense(choice):
            return dense
        self.backends_used.add(DENSE, choice)

        def attended() -> torch.Tensor:
            with autocast_done(own):
                return own.of_queries(kernel()[0])

        return attended

    def _run_dense(
        self, call: AttentionCall, reason: str, dense: Callable[[], torch.Tensor], book: LayerRecord
    ) -> torch.Tensor:
        if self.observer is not None:
            self.observer(call)
        with self._counting:
            book.dense_calls[reason] += 1
        steps = self.steps
        if steps is not None and call.is_counted:
            steps.add_dense(call, reason)
        begin = self.dense_time.start(call.q.device)
        out = dense()
        self.dense_time.stop(begin, call.q.device)
        return out

    def _dense_reason(self, call: AttentionCall) -> str | None:
        if self.recipe.select.is_dense:
            return "recipe is dense"
        if isinstance(call.layout, str):
            return call.layout
        if call.q.shape[2] % call.k.shape[2]:
            return f"{call.q.shape[2]} query heads are no groups of {call.k.shape[2]} key heads"
        if call.pairs is not None and (reason := self.planner.why_not_pairs()) is not None:
            return reason
        if self.automatic:
            reason = why_not_worthwhile(call.layout, call.q.device, self.min_tokens)
            if reason is not None:
                return reason
        elif (call.layout, call.q.device) not in self._seen_layouts:
            self._advise(call.layout, call.q.device)
        self.planner.refuse(call)
        return self.recipe.schedule.dense_reason(call.step, call.layer, len(self.records))

    def _advise(self, layout: TokenLayout, device: torch.device) -> None:
        """Say once what a recipe chosen by name will not gain at this layout."""
        if len(self._seen_layouts) >= MOST_ADVISED:
            return
        self._seen_layouts.add((layout, device))
        reason = why_not_worthwhile(layout, device, self.min_tokens)
        if reason is not None:
            self.note(f"The recipe may be slower than dense here: {reason}.")

    def _refuse(
        self, device: torch.device, dtype: torch.dtype | None, head_dim: int | None = None, hidden: bool = False
    ) -> None:
        """Raise where an operation of the recipe cannot run; looked up where it was asked before."""
        asked = (device, dtype, head_dim, hidden)
        if asked not in self._allowed:
            self._choices_of(Case(device, dtype, head_dim, hidden=hidden))
            self._allowed.add(asked)

    def _choices_of(self, case: Case) -> dict[Operation, Choice]:
        """The recipe's choices for a case, made once.

        Raises:
            ValueError: the backend was named and cannot run one of the operations.
        """
        found = self._choices.get(case)
        if found is None:
            found = self._choices[case] = self.planner.choices(case, self.backend)
        return found

    def _attention_backend(self, call: AttentionCall, plan: AttentionPlan) -> str:
        """The backend of attention to the kept blocks, recorded as used."""
        precision = self.recipe.precision
        case = case_of(call.q, call.k, call.v, mask=plan.mask, rows=plan.rows, key_mask=call.key_mask)
        choice = self._attention_choices.get(case)
        if choice is None:
            choice = self._attention_choices[case] = precision.choose(call, plan, self.backend)
        self.backends_used.add(precision.operation, choice)
        return choice.name
