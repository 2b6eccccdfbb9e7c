"""The public calls: patch a pipeline, and undo it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from . import presets
from .engine import Engine
from .kernels import BACKENDS
from .layout import StepContext
from .patches import hooks
from .patches.artifact import CalibrationArtifact
from .patches.families import EXCLUDED, FAMILIES, Family, family_of
from .patches.families.family import patch_size
from .patches.handle import PatchHandle
from .patches.learned import SaveWithoutLearned, attach, head_shape
from .patches.operator import new_counts
from .patches.placement import execution_device
from .patches.processors import ProcessorWatch
from .patches.session import Session
from .recipe import Recipe
from .stages.compensate.linear import LinearBranch
from .stages.order.axes import MISSING, ChosenAxes
from .stages.select.frozen import FrozenMasks


def patch(
    target: Any,
    recipe: Recipe | str | None = None,
    *,
    backend: str = "auto",
    calibration: str | Path | CalibrationArtifact | None = None,
    rederive: bool = False,
    **options: Any,
) -> PatchHandle:
    """Make a diffusers pipeline run its self-attention under a recipe.

    Only the given pipeline is affected; weights and forward code stay as they are. A recipe that learns adds
    its parameters as modules named ``dit_accel`` under the attention layers; ``save_pretrained`` leaves them
    out, :func:`~dit_accel.save_adapter` saves them. The calls of a
    step are decided when they run, so the patch works under torch.compile, offloading, LoRA and caching,
    whether those came before or come after.

    Args:
        target: a diffusers pipeline, every known transformer of which is patched, or one transformer.
        recipe: a :class:`~dit_accel.Recipe`, the name of a preset, or None for a safe default, which stays
            dense where a sequence is too short to gain and says so in the summary.
        backend: of every operation; a named one that cannot run raises when the first forward starts.
        calibration: a file of :func:`~dit_accel.calibrate`, or what it returned: plans made offline, in place of the
            recipe's selection. Model, order and selection must be those calibrated, and so must the latent grid
            when a call comes.
        rederive: where a calibration's masks do not fit (another grid, density or selection), keep the orders it
            chose and select anew, rather than raise.
        options: of the named preset, e.g. ``density=0.2``.

    Returns:
        A handle: ``handle.remove()`` undoes everything, ``handle.summary()`` says what ran. It is also a
        context manager.

    Raises:
        ValueError: unknown recipe, option or backend, a model of no known family, a pipeline that is patched
            already, or a calibration that is needed or does not fit. Nothing has been touched then.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}; known are {', '.join(BACKENDS)}.")
    transformers = transformers_of(target)
    chosen, note = _choose(recipe, options, in_pipeline=not isinstance(target, nn.Module))
    for name, model, _ in transformers:
        if _root_hook(model) is not None:
            raise ValueError(
                f"{name or type(model).__name__} is patched already; "
                "call unpatch(pipe) or handle.remove() before patching with another recipe."
            )
    artifact = CalibrationArtifact.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    plans = {name: _calibrated(name, model, family, chosen, artifact, rederive) for name, model, family in transformers}
    handle = PatchHandle(target, chosen, note)
    handle.record(_forget_compiled_code)
    try:
        for name, model, family in transformers:
            own, masks = plans[name]
            engine = _patch_transformer(handle, name, model, family, backend, recipe is None, own)
            engine.planner.frozen, engine.planner.rederive = masks, rederive
    except BaseException:
        handle.remove()
        raise
    _forget_compiled_code()
    return handle


def unpatch(target: Any) -> None:
    """Undo the patch of a pipeline or transformer, as ``handle.remove()`` does.

    Raises:
        ValueError: it is not patched.
    """
    handles = {id(hook.handle): hook.handle for _, model, _ in transformers_of(target) if (hook := _root_hook(model))}
    if not handles:
        raise ValueError(f"{type(target).__name__} is not patched.")
    for handle in handles.values():
        handle.remove()


def handle_of(target: Any) -> PatchHandle:
    """The handle of a patched pipeline or transformer.

    Raises:
        ValueError: it is not patched.
    """
    for _, model, _ in transformers_of(target):
        if (hook := _root_hook(model)) is not None:
            return hook.handle
    raise ValueError(f"{type(target).__name__} is not patched.")


def transformers_of(target: Any) -> list[tuple[str, nn.Module, Family]]:
    """Name, module and family of every transformer of a pipeline, or of the one given, to patch."""
    if isinstance(target, nn.Module):
        components: Mapping[str, Any] = {"": target}
    elif hasattr(target, "components"):
        components = target.components
    else:
        raise ValueError(f"patch takes a diffusers pipeline or transformer, got {type(target).__name__}.")
    models = {name: _unwrap(value) for name, value in components.items() if isinstance(value, nn.Module)}
    found = [(name, model, family) for name, model in models.items() if (family := family_of(model))]
    if not found:
        classes = [type(m).__name__ for n, m in models.items() if n == "" or n.startswith(("transformer", "unet"))]
        for name in classes:
            if name in EXCLUDED:
                raise ValueError(f"{name} cannot be patched. {EXCLUDED[name]}")
        known = ", ".join(f"{family.name} ({', '.join(family.transformers)})" for family in FAMILIES)
        raise ValueError(
            f"No known transformer in {type(target).__name__}: got {', '.join(classes) or 'none'}. "
            f"Known families: {known}."
        )
    return found


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def _choose(recipe: Recipe | str | None, options: Mapping[str, Any], in_pipeline: bool) -> tuple[Recipe, str | None]:
    if recipe is not None:
        return presets.resolve(recipe, **options), None
    chosen = presets.automatic(in_pipeline, **options)
    score = "exact block mass" if in_pipeline else "pooled scores"
    return chosen, f"no recipe was given: {score}, dense where a sequence is too short to gain"


def _min_tokens(model: nn.Module, family: Family) -> int:
    # On a CPU dense attention is slow enough for a few thousand tokens to gain.
    return 2048 if execution_device(model).type == "cpu" else family.min_tokens


def _calibrated(
    name: str,
    model: nn.Module,
    family: Family,
    recipe: Recipe,
    artifact: CalibrationArtifact | None,
    rederive: bool,
) -> tuple[Recipe, FrozenMasks | None]:
    """What one transformer runs: its recipe, and masks if they hold."""
    if artifact is None:
        if isinstance(recipe.order, ChosenAxes):
            raise ValueError(MISSING)
        return recipe, None
    part = artifact.part_for(name, model, dict(self_attentions(model, family)))
    resolved, holds = artifact.recipe_for(part, recipe, rederive)
    if not holds:
        return resolved, None
    # Nothing is left to search: the whole dense phase is dense.
    return resolved.with_fields({"schedule.plan_in_dense_phase": False}), part.masks


def _patch_transformer(
    handle: PatchHandle,
    name: str,
    model: nn.Module,
    family: Family,
    backend: str,
    automatic: bool,
    recipe: Recipe,
) -> Engine:
    layers = list(self_attentions(model, family))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no self-attention at {', '.join(family.self_attention)}; "
            "this version of diffusers may have renamed its modules."
        )
    watch = ProcessorWatch(model, [module for _, module in layers], handle.record)
    pipe = None if handle.target is model else handle.target
    engine = Engine(recipe, [path for path, _ in layers], backend, _min_tokens(model, family), automatic)
    session = Session(engine, family, patch_size(dict(getattr(model, "config", {}))), model, pipe, handle.schedules)
    handle.sessions[name] = session
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    gradients = partial(_watch_gradients, handle, session, model, layers)
    root = hooks.PublishLatents(session, handle, names, watch, gradients)
    handle.record(model.register_forward_pre_hook(root, with_kwargs=True).remove)
    handle.record(model.register_forward_hook(hooks.ClearAll(session), always_call=True).remove)
    for index, (_, module) in enumerate(layers):
        handle.record(partial(setattr, module, "__class__", type(module)))
        module.__class__ = hooks.patched_class(type(module))  # type: ignore[arg-type]
        counts = engine.records[index].compiled_dense = new_counts()
        publish = hooks.PublishLayer(session, index, counts)
        handle.record(module.register_forward_pre_hook(publish).remove)
        handle.record(module.register_forward_hook(hooks.ClearLayer(session, index)).remove)
        always_dense = handle.recipe.schedule.dense_reason(StepContext(), index, len(layers)) is not None
        if isinstance(handle.recipe.compensate, LinearBranch) and not always_dense:
            learned = handle.recipe.compensate.build(*head_shape(module))
            handle.record(attach(module, learned, model))
            engine.learned[index] = learned
    if engine.learned and hasattr(model, "save_pretrained"):
        saver = SaveWithoutLearned(model.save_pretrained)  # type: ignore[arg-type]
        handle.record(_replace_method(model, "save_pretrained", saver))
    if hasattr(model, "cache_context"):
        handle.record(_replace_method(model, "cache_context", hooks.BranchContext(model.cache_context)))  # type: ignore[arg-type]
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
        handle.record(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if is_block:
            handle.record(module.register_forward_hook(hooks.LeaveBlock()).remove)


def self_attentions(model: nn.Module, family: Family) -> Iterator[tuple[str, Any]]:
    """Path and module of every self-attention that a patch would take."""
    for path, module in model.named_modules():
        if family.has_self_attention(path) and hasattr(module, "processor"):
            yield path, module


def _replace_method(model: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Shadow a method of one instance. Returns the undo."""
    before = vars(model).get(name)
    setattr(model, name, replacement)

    def undo() -> None:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)

    return undo


def _root_hook(model: nn.Module) -> hooks.PublishLatents | None:
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, hooks.PublishLatents):
            return hook
    return None


def _forget_compiled_code() -> None:
    """Compiled code does not guard on hooks: without this it would go on as if none had been added."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
