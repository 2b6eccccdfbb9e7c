"""Hooks, symbols and learned modules of one patched transformer, each recorded with its undo."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..engine import Engine
from ..layout import StepContext
from ..recipe import Recipe
from . import hooks
from .families import Family
from .families.family import patch_size
from .handle import PatchHandle
from .learned import ROUTER, SaveWithoutLearned, attach, build, head_shape
from .operator import new_counts
from .processors import ProcessorWatch
from .rotary import angles_hook
from .seam import is_diverted
from .session import Session
from .targets import other_attentions, self_attentions


def install(
    handle: PatchHandle,
    name: str,
    model: nn.Module,
    family: Family,
    backend: str,
    automatic: bool,
    recipe: Recipe,
) -> Engine:
    """Patch one transformer.

    Args:
        handle: records how to undo each step, in their order.
        name: of the transformer in its pipeline.
        automatic: whether the recipe was not chosen by the user: short sequences then stay dense.
        recipe: what this transformer runs.

    Raises:
        ValueError: it has no self-attention where its family has it, or a processor that cannot be diverted.
    """
    layers = list(self_attentions(model, family))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no self-attention at {', '.join(family.self_attention)}; "
            "this version of diffusers may have renamed its modules."
        )
    watch = ProcessorWatch(model, [module for _, module in layers], handle.record)
    pipe = None if handle.target is model else handle.target
    engine = Engine(recipe, [path for path, _ in layers], backend, family.min_tokens, automatic)
    engine.left_alone = other_attentions(model, family)
    if family.alone:
        engine.note(
            f"{type(model).__name__} is of no known family: calls that hold its latents and nothing else run sparse. "
            "Declare a Family to say more (dit_accel.register_family).",
            lasting=True,
        )
    session = Session(engine, family, patch_size(dict(getattr(model, "config", {}))), model, pipe, handle.schedules)
    handle.sessions[name] = session
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    gradients = partial(_watch_gradients, handle, session, model, layers)
    root = hooks.PublishLatents(session, handle, names, watch, gradients)
    handle.record(model.register_forward_pre_hook(root, with_kwargs=True).remove)
    if not recipe.reuse.is_none:
        # Imported here, since it imports diffusers' hooks.
        from .reuse.install import install_reuse

        root.reuse = session.reuse = install_reuse(handle, model, session, recipe.reuse)
        if hasattr(model, "enable_cache"):
            handle.record(replace_method(model, "enable_cache", hooks.RefuseCache(model.enable_cache)))  # type: ignore[arg-type]
    handle.record(model.register_forward_hook(hooks.ClearAll(session), always_call=True).remove)
    for index, (_, module) in enumerate(layers):
        handle.record(partial(setattr, module, "__class__", type(module)))
        module.__class__ = hooks.patched_class(type(module))  # type: ignore[arg-type]
        counts = engine.records[index].compiled_dense = new_counts()
        compensate = handle.recipe.compensate
        kind = hooks.PublishGate if compensate.reads_input else hooks.PublishLayer
        publish = kind(session, index, counts)
        handle.record(module.register_forward_pre_hook(publish, with_kwargs=kind.with_kwargs).remove)
        # A patch that changes nothing is what others are measured against.
        take = None if recipe == Recipe() else angles_hook(session, module, is_diverted)
        if take is not None:
            handle.record(module.register_forward_pre_hook(take, with_kwargs=True).remove)
        handle.record(module.register_forward_hook(hooks.ClearLayer(session, index)).remove)
        always_dense = handle.recipe.schedule.dense_reason(StepContext(), index, len(layers)) is not None
        if compensate.is_learned and not always_dense:
            learned = build(module, compensate)
            handle.record(attach(module, learned, model))
            engine.learned[index] = learned
        select = handle.recipe.select
        if select.is_learned and not always_dense:
            router = engine.routers[index] = select.build(*head_shape(module))
            handle.record(attach(module, router, model, ROUTER))
    if (engine.learned or engine.routers) and hasattr(model, "save_pretrained"):
        saver = SaveWithoutLearned(model.save_pretrained)  # type: ignore[arg-type]
        handle.record(replace_method(model, "save_pretrained", saver))
    if hasattr(model, "cache_context"):
        handle.record(replace_method(model, "cache_context", hooks.BranchContext(model.cache_context)))  # type: ignore[arg-type]
    return engine


def _watch_gradients(
    handle: PatchHandle, session: Session, model: nn.Module, layers: Sequence[tuple[str, nn.Module]]
) -> None:
    """Hooks by which blocks and attention layers are recognised when checkpointing repeats them.

    They are added at the first forward with gradients: inference would pay for them in every layer.
    """
    modules = {path.rpartition(".")[0]: True for path, _ in layers} | {path: False for path, _ in layers}
    for path, is_block in modules.items():
        module = model.get_submodule(path)
        enter = hooks.EnterModule(session, is_block)
        # First of all: FSDP's hook hands on other tensors than checkpointing keeps.
        handle.record(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
        if is_block:
            handle.record(module.register_forward_hook(hooks.LeaveBlock()).remove)


def replace_method(model: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Shadow a method of one instance. Returns the undo, which leaves what others have put in its place since."""
    before = vars(model).get(name)
    setattr(model, name, replacement)

    def undo() -> None:
        if vars(model).get(name) is not replacement:
            return
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)

    return undo


def forget_compiled_code() -> None:
    """Compiled code does not guard on hooks: without this it would go on as if none had been added."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
