"""How a layer's attention was served in one forward, and whether a later one will be served in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...call import AttentionCall
from ...engine import Engine
from ...kept_plans import KeptPlan, plan_key
from ...layout import TokenLayout
from ...run import Kept
from ...stages.schedule import DENSE_LAYER

if TYPE_CHECKING:
    from ..forwards import Forward
    from ..session import Session


@dataclass(frozen=True, eq=False)
class Served:
    """A call that did the same as any other of its layer, branch and plan would.

    Attributes:
        kept: its plan; None where the layer is always dense.
        plans: of its run, where ``key`` finds the plan.
        density: of the call, a 0-d tensor.
    """

    layout: TokenLayout
    kept: KeptPlan | None
    plans: Kept | None
    key: tuple[Any, ...]
    density: torch.Tensor | None

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
        key = plan_key(call)
        if call.plan is None:
            return cls(call.layout, None, None, key, None) if call.dense_reason == DENSE_LAYER else None
        kept, plans = call.used.get(call.layer), call.kept
        if kept is None or plans is None or call.plan.mask.token_bits is not None:
            return None
        if call.step.forward_id in (kept.made.forward_id, (kept.chosen or kept.made).forward_id):
            return None  # the first call that reads a packed plan waits for the device
        return cls(call.layout, kept, plans, key, call.plan.work(engine.recipe.compensate.density))

    def serves(self, session: Session, forward: Forward, layer: int) -> bool:
        """Whether the layer's call in this forward, of the same run and branch, will be served in the same way."""
        engine = session.engine
        if session.layout(forward, self.layout.seq_len) != self.layout:
            return False
        reason = engine.recipe.schedule.dense_reason(forward.step, layer, len(engine.records))
        kept, plans = self.kept, self.plans
        if kept is None or plans is None:
            return reason == DENSE_LAYER
        if reason is not None:
            return False
        found: KeptPlan | None = plans.plans.get(self.key)
        if found is not kept:
            return False
        step = forward.step
        if step.computed is None:  # as the call itself would be counted: a recipe's reuse counts forwards by itself
            step = plans.aged(step, self.key)
        return engine.planner.serves_at_once(kept, step)
