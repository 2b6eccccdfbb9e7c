"""The hooks of a recipe's cache on one transformer, each recorded with its undo."""

from __future__ import annotations

from typing import Any

from diffusers.hooks.hooks import StateManager
from torch import nn

from ...stages.reuse.protocol import Reuse
from ..handle import PatchHandle
from ..hooks import WHOLE_COMPILED, EndReuse
from ..session import Session
from .blocks import blocks_of, cache_of_the_user, hooks_of, refuse_stage, stand_in_of
from .hosted import HostedHook, host
from .tracker import ReuseTracker, RunStates


def install_reuse(handle: PatchHandle, model: nn.Module, session: Session, stage: Reuse) -> ReuseTracker:
    """Put a cache around the blocks of a transformer.

    Raises:
        ValueError: the recipe lacks what the cache needs, the user has enabled a cache, the model is compiled whole or
            runs on several devices, or its blocks are of classes that diffusers does not know.
    """
    refuse(handle.target, model, stage)
    blocks = blocks_of(model)
    refuse_stage(model, blocks, stage)
    stand_in = stand_in_of(blocks)
    tracker = ReuseTracker(session, stage)
    stage.apply(stand_in, [path for path, _, _ in blocks], tracker.around)
    managers: dict[int, RunStates] = {}
    for module in stand_in.modules():
        for hook in hooks_of(module):
            for name, value in list(vars(hook).items()):
                if isinstance(value, StateManager):
                    setattr(hook, name, managers.setdefault(id(value), RunStates(value, tracker)))
    tracker.root_hooks = hooks_of(stand_in)
    for path, block, _ in blocks:
        (hook,) = hooks_of(stand_in.get_submodule(path))
        handle.record(host(block, HostedHook(tracker, block, hook)))
    handle.record(model.register_forward_hook(EndReuse(tracker)).remove)
    return tracker


def refuse(target: Any, model: nn.Module, stage: Reuse) -> None:
    """Raise where a cache cannot be put on a model."""
    sentence = stage.refusal()
    if sentence is not None:
        raise ValueError(sentence)
    users = cache_of_the_user(model)
    if users is not None:
        raise ValueError(
            f"{type(model).__name__} has a cache already ({users}), and two would answer for each other: disable it, "
            "or patch with reuse none."
        )
    components = getattr(target, "components", {}).values() if not isinstance(target, nn.Module) else (target,)
    if any(part is not model and getattr(part, "_orig_mod", None) is model for part in components):
        raise ValueError(WHOLE_COMPILED)
