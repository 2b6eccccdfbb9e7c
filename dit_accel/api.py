"""The public calls: patch a pipeline, and undo it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from . import presets
from .frozen_planner import FrozenPlanner
from .kernels import BACKENDS
from .patches.artifact import CalibrationArtifact
from .patches.families import Family
from .patches.handle import PatchHandle
from .patches.install import forget_compiled_code, install
from .patches.targets import controls_of, root_hook, self_attentions, transformers_of
from .recipe import Recipe
from .stages.order.axes import MISSING
from .stages.reuse.none import NoReuse
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

    Control networks attend over the same latents, and run the recipe too, without its reuse. Where a recipe holds what
    was made for a transformer's own layers (a calibration, densities or orders per head, what was learned) they stay
    dense, and the summary says so.

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
    chosen, note = presets.choose(recipe, options, in_pipeline=not isinstance(target, nn.Module))
    controls = controls_of(target)
    for name, model, _ in (*transformers, *controls):
        if root_hook(model) is not None:
            raise ValueError(
                f"{name or type(model).__name__} is patched already; "
                "call unpatch(pipe) or handle.remove() before patching with another recipe."
            )
    artifact = CalibrationArtifact.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    plans = {name: _calibrated(name, model, family, chosen, artifact, rederive) for name, model, family in transformers}
    handle = PatchHandle(target, chosen, note)
    handle.record(forget_compiled_code)
    try:
        for name, model, family in transformers:
            own, masks = plans[name]
            engine = install(handle, name, model, family, backend, recipe is None, own)
            if masks is not None:
                engine.planner = FrozenPlanner(own, masks, rederive)
        for name, model, family in controls:
            if artifact is None and not chosen.is_of_one_model:
                install(handle, name, model, family, backend, recipe is None, replace(chosen, reuse=NoReuse()))
            else:
                engine.note(
                    f"{name} stays dense: the recipe holds what was made for a transformer's layers.", lasting=True
                )
    except BaseException:
        handle.remove()
        raise
    forget_compiled_code()
    return handle


def unpatch(target: Any) -> None:
    """Undo the patch of a pipeline or transformer, as ``handle.remove()`` does.

    Raises:
        ValueError: it is not patched.
    """
    handles = {id(hook.handle): hook.handle for _, model, _ in transformers_of(target) if (hook := root_hook(model))}
    if not handles:
        raise ValueError(f"{type(target).__name__} is not patched.")
    for handle in handles.values():
        handle.remove()


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
        if recipe.order.needs_calibration:
            raise ValueError(MISSING)
        return recipe, None
    part = artifact.part_for(name, model, dict(self_attentions(model, family)))
    resolved, holds = artifact.recipe_for(part, recipe, rederive)
    if not holds:
        return resolved, None
    # Nothing is left to search: the whole dense phase is dense.
    return resolved.with_fields({"schedule.plan_in_dense_phase": False}), part.masks
