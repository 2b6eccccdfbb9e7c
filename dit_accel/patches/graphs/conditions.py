"""Whether anything of a forward may be captured or replayed, beside what its blocks say."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..forwards import Forward
from ..seam import function_mode_is_on
from ..session import Session

OF_INFERENCE = "tensors of torch.inference_mode do not count their changes: use torch.no_grad"


def why_not_now(session: Session, forward: Forward, device_type: str) -> str | None:
    """Why blocks run by themselves now, a sentence without its end, empty where a user has asked for that or is told
    elsewhere; None where they need not."""
    engine = session.engine
    if not engine.switched_on or engine.observer is not None or engine.output_tap is not None:
        return ""
    if forward.step.index is None or torch.is_grad_enabled():
        return ""
    if engine.steps is not None and engine.steps.with_seconds:
        return "the calls of recorded steps are timed one by one"
    if session.parallel_config is not None:
        return "processes share the transformer"
    if torch.is_inference_mode_enabled():
        return OF_INFERENCE
    if torch.is_autocast_enabled(device_type):
        return "autocast keeps casts of weights that a replay would not renew: cast the model"
    if _has_any_global_hook() or torch._C._len_torch_dispatch_stack() or function_mode_is_on():
        return "hooks of all modules, and modes of torch, would see nothing of a replay"
    return None
