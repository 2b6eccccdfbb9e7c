"""Published and plain methods as recipes: plain ones here, published ones in files by what they look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..names import Names
from ..recipe import Recipe
from ..stages.order.simple import Tiles
from ..stages.schedule import Schedule
from ..stages.select.pooled import Pooled
from ..stages.select.static import Window
from .grid import clear, dina, gna, masformer, na, patterns, radial, sta
from .profiles import balanced, fast, maximal
from .searched import FEW_STEPS, adaspa, carried, ear, mass, paro, pbs, psa, rectified, recycled, sparge, sparsed, vmoba
from .trained import seer, sla, sparge2, ssa, vsa
from .whole import agent, sage


def dense() -> Recipe:
    """The model's own attention, untouched: for measuring, and to see what a patch costs."""
    return Recipe()


def window(
    window: tuple[int | float, int | float, int | float] = (1.0, 0.4, 0.4),
    stride: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    dense_fraction: float = 0.2,
) -> Recipe:
    """Neighbourhood window on the latent grid, tokens in 3-D tiles (GNA, arXiv 2504.16922).

    Args:
        window, stride, dilation: per dimension, see :class:`~dit_accel.stages.select.static.Window`.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return Recipe(
        order=Tiles(),
        select=Window(window=window, stride=stride, dilation=dilation),
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def pooled(
    density: float | None = 0.2,
    top_p: float | None = None,
    dense_fraction: float = 0.2,
    refresh_every: int = 1,
) -> Recipe:
    """Key blocks by the pooled score of 3-D tiles, top-k, top-p, or their union (SpargeAttn, arXiv
    2502.18137).

    Args:
        density, top_p: see :class:`~dit_accel.stages.select.pooled.Pooled`.
        dense_fraction: share of the denoising steps that stay dense at the start; none in a run without guidance of
            at most eight.
        refresh_every: denoising steps that share one plan.
    """
    return Recipe(
        order=Tiles(),
        select=Pooled(density=density, top_p=top_p),
        schedule=Schedule(dense_fraction=dense_fraction, refresh_every=refresh_every, few_steps=FEW_STEPS),
    )


AUTOMATIC_DENSITY = {"mass": 0.3, "pooled": 0.3}
"""What a patch keeps without a recipe, of a pipeline and of a bare transformer (docs/fidelity.md)."""


def automatic(in_pipeline: bool = True, **options: Any) -> Recipe:
    """The recipe where none is named, at a density that keeps the pictures: :func:`mass` with means of what is left
    out, the best for its time on a trained model of real length (docs/fidelity.md), with dense steps in this package's
    kernel; or outside a pipeline :func:`pooled`: without steps nobody knows for which forwards a plan that is searched
    once should serve.

    Raises:
        ValueError: an option that the preset lacks.
    """
    if not in_pipeline:
        return resolve("pooled", **({"density": AUTOMATIC_DENSITY["pooled"]} | options))
    recipe = resolve("mass", **({"density": AUTOMATIC_DENSITY["mass"], "means": True} | options))
    return recipe.with_fields({"schedule.own_dense": True})


def choose(recipe: Recipe | str | None, options: Mapping[str, Any], in_pipeline: bool) -> tuple[Recipe, str | None]:
    """What :func:`resolve` gives, or :func:`automatic` without a recipe and a note that says so.

    Raises:
        ValueError, TypeError: as of :func:`resolve`.
    """
    if recipe is not None:
        return resolve(recipe, **options), None
    score = "exact block mass" if in_pipeline else "pooled scores"
    note = f"no recipe was given: {score}, dense where a sequence is too short to gain"
    return automatic(in_pipeline, **options), note


PRESETS: dict[str, Callable[..., Recipe]] = {
    "dense": dense,
    "window": window,
    "pooled": pooled,
    "mass": mass,
    "ear": ear,
    "carried": carried,
    "recycled": recycled,
    "adaspa": adaspa,
    "paro": paro,
    "sparsed": sparsed,
    "sparge": sparge,
    "vmoba": vmoba,
    "pbs": pbs,
    "rectified": rectified,
    "psa": psa,
    "na": na,
    "dina": dina,
    "gna": gna,
    "masformer": masformer,
    "sta": sta,
    "clear": clear,
    "agent": agent,
    "sage": sage,
    "radial": radial,
    "patterns": patterns,
    "sla": sla,
    "sparge2": sparge2,
    "ssa": ssa,
    "vsa": vsa,
    "seer": seer,
    "balanced": balanced,
    "fast": fast,
    "max": maximal,
}


def _check_preset(preset: object) -> None:
    """Raise TypeError for what cannot be a preset."""
    if isinstance(preset, type) or not callable(preset):
        raise TypeError(f"A preset must be a function that returns a Recipe, got {preset!r}.")
    for name, option in inspect.signature(preset).parameters.items():
        if option.default is option.empty:
            raise TypeError(f"The option {name} of a preset needs a default: a preset can be named alone.")


NAMES: Names[Callable[..., Recipe]] = Names(
    "recipe",
    PRESETS,
    "dit_accel.presets",
    _check_preset,
    reserved=("auto",),  # which the command line knows
)
"""All presets: this package's, those of :func:`dit_accel.register`, and those of entry points."""


def resolve(recipe: Recipe | str, **options: Any) -> Recipe:
    """A recipe from a preset's name and options, from a file of :meth:`Recipe.save`, or a recipe as it is.

    Raises:
        ValueError: unknown preset, a file (a name that ends in .json) without a recipe, or an option that the
            preset lacks.
        TypeError: somebody's preset returned something else.
    """
    if isinstance(recipe, Recipe):
        if options:
            raise ValueError(
                f"Options {sorted(options)} go with a preset's name; change a Recipe with recipe.with_fields(...)."
            )
        return recipe
    if recipe.endswith(".json"):
        return resolve(Recipe.load(recipe), **options)
    name, colon, _ = recipe.partition(":")
    if colon and name in NAMES:
        raise ValueError(
            f"Unknown recipe {recipe!r}: options stand beside the name, as in patch(pipe, {name!r}, density=0.2), or "
            f"on the command line '{name}; select.density=0.2'."
        )
    preset = NAMES.get(recipe)
    allowed = inspect.signature(preset).parameters
    for name in options:
        if name not in allowed:
            spelled = ", ".join(allowed) or "none"
            raise ValueError(f"Recipe {recipe!r} has no option {name!r}; its options are {spelled}.")
    found = preset(**options)
    if not isinstance(found, Recipe):
        raise TypeError(f"The preset {recipe!r} must return a Recipe, got {found!r}.")
    return found
