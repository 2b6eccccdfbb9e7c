"""How a layer's attention was served in one forward, and whether a later one will be served in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...call import AttentionCall
from ...engine import Engine
from ...kept_plans import KeptPlan, plan_key
from ...layout import TokenLayout
from ...planner import PlanSource
from ...records import Shares
from ...run import Kept
from ...stages.schedule import DENSE_LAYER

if TYPE_CHECKING:
    from ..forwards import Forward
    from ..session import Session


@dataclass(frozen=True, eq=False)
class Served:
    """A call that did the same as any other of its layer, branch and plan would.

    Attributes:
        kept: its plan, where an earlier call made it.
        plans: of its run, where ``key`` finds that plan.
        source: what decided its plan, where no earlier call did.
        shares: of the call; None where it was dense, as the layer always is.
    """

    layout: TokenLayout
    kept: KeptPlan | None = None
    plans: Kept | None = None
    key: tuple[Any, ...] = ()
    source: PlanSource | None = None
    shares: Shares | None = None

    @property
    def makes_plan(self) -> bool:
        """Whether each such call makes a plan of its own."""
        return self.source is not None and self.source.anew

    @classmethod
    def of(cls, engine: Engine, call: AttentionCall) -> Served | str | None:
        """Of a call that has run; why no such call ever is, or None where this one alone is not."""
        if not isinstance(call.layout, TokenLayout) or call.repeated:
            return None
        if call.layout.padding or call.layout.queries is not None:
            return "calls with padding, or with keys of tokens that do not query, are not replayed"
        if call.mask is not None:
            return "calls with a mask of keys are not replayed, since its content must be looked at in every forward"
        if call.heads is not None or call.ring is not None:
            return "calls that processes share are not replayed"
        if call.plan is None:
            return cls(call.layout) if call.dense_reason == DENSE_LAYER else None
        source = engine.planner.source(call.step, call.layer, call.layout)
        if source is not None:
            return cls(call.layout, source=source, shares=engine.shares_of(call, call.plan))
        kept, plans = call.used.get(call.layer), call.kept
        if kept is None or plans is None:
            return None
        if call.step.forward_id in (kept.made.forward_id, (kept.chosen or kept.made).forward_id):
            return None  # the first call that reads a packed plan waits for the device
        return cls(call.layout, kept, plans, plan_key(call), shares=engine.shares_of(call, call.plan))

    def serves(self, session: Session, forward: Forward, layer: int) -> bool:
        """Whether the layer's call in this forward, of the same run and branch, will be served in the same way."""
        engine = session.engine
        if session.layout(forward, self.layout.seq_len) != self.layout:
            return False
        reason = engine.recipe.schedule.dense_reason(forward.step, layer, len(engine.records))
        if self.shares is None:
            return reason == DENSE_LAYER
        if reason is not None:
            return False
        if self.source is not None:
            return engine.planner.source(forward.step, layer, self.layout) == self.source
        kept, plans = self.kept, self.plans
        assert kept is not None
        assert plans is not None
        found: KeptPlan | None = plans.plans.get(self.key)
        if found is not kept:
            return False
        step = forward.step
        if step.computed is None:  # as the call itself would be counted: a recipe's reuse counts forwards by itself
            step = plans.aged(step, self.key)
        return engine.planner.serves_at_once(kept, step)
