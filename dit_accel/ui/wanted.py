"""What a visitor asks for, checked before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .. import presets
from ..pipelines.generate import call_arguments, makes_video
from ..pipelines.sizes import fitted_frames, refuse_size
from ..recipe import Recipe

LONGEST_PROMPT, MOST_STEPS, LARGEST_SEED = 10_000, 1000, 2**62


@dataclass(frozen=True)
class Form:
    """The fields of the page, as text.

    Attributes:
        prompt: what to generate.
        width, height: pixels; empty for the model's.
        frames: of a video; empty for the model's.
        steps: denoising steps; empty for the model's.
        seed: of the noise; empty for 0.
        recipe: a name of :func:`offered_recipes`.
        density: kept share of block pairs; empty for the recipe's own.
        with_dense: also run dense.
    """

    prompt: str
    width: str = ""
    height: str = ""
    frames: str = ""
    steps: str = ""
    seed: str = ""
    recipe: str = "auto"
    density: str = ""
    with_dense: bool = True


@dataclass(frozen=True)
class Wanted:
    """A checked form.

    Attributes:
        prompt, seed: as asked.
        settings: size, frames and steps, as :func:`~dit_accel.pipelines.generate.generate` takes them.
        recipe: None for the automatic one.
        with_dense: also run dense.
    """

    prompt: str
    seed: int
    settings: dict[str, int]
    recipe: Recipe | None
    with_dense: bool

    @classmethod
    def read(cls, form: Form, pipe: Any) -> Wanted:
        """Check a form against the pipeline that will run.

        Raises:
            ValueError: one sentence with the value got, and what is allowed.
        """
        prompt = form.prompt.strip()
        if not prompt:
            raise ValueError("The prompt is empty: say what to generate.")
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"The prompt must have at most {LONGEST_PROMPT} characters, got {len(prompt)}.")
        fields = {name: _whole(name, getattr(form, name), 1) for name in ("width", "height", "frames", "steps")}
        settings = {name: value for name, value in fields.items() if value is not None}
        if settings.get("steps", 1) > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {settings['steps']}.")
        seed = _whole("seed", form.seed, 0) or 0
        if seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {seed}.")
        if not makes_video(pipe):
            settings.pop("frames", None)
        refuse_size(pipe, settings.get("width"), settings.get("height"))
        if "frames" in settings:
            settings["frames"] = fitted_frames(pipe, settings["frames"])
        sized: dict[str, Any] = dict(settings)
        call_arguments(pipe, **sized)
        return cls(prompt, seed, settings, _recipe(form.recipe, form.density), form.with_dense)

    @property
    def dense_key(self) -> tuple[Any, ...]:
        """Forms that are alike in this have one dense result."""
        return self.prompt, self.seed, tuple(sorted(self.settings.items()))


def offered_recipes() -> list[str]:
    """Names of the recipes that run without training and without a calibration: the automatic one, profiles, others."""
    first = ["auto", "balanced", "fast", "max"]
    recipes = {name: presets.resolve(name) for name in presets.PRESETS}
    others = [
        name
        for name, recipe in recipes.items()
        if not (recipe.compensate.is_learned or recipe.select.is_learned or recipe.order.needs_calibration)
    ]
    return list(dict.fromkeys([*first, *others]))


def _recipe(name: str, density: str) -> Recipe | None:
    asked = density.strip()
    if name == "auto" and not asked:
        return None
    recipe = presets.automatic() if name == "auto" else presets.resolve(name)
    if not asked:
        return recipe
    if recipe.select.density is None:
        raise ValueError(f"The recipe {name} has no density to set, got {asked!r}: leave the field empty.")
    try:
        share = float(asked)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"density must be a number in (0, 1], got {asked!r}.")
    return recipe.with_fields({"select.density": share})


def _whole(name: str, text: str, least: int) -> int | None:
    """A whole number of decimal digits; None for an empty field."""
    asked = text.strip()
    if not asked:
        return None
    if not re.fullmatch(r"[0-9]{1,20}", asked) or int(asked) < least:
        raise ValueError(f"{name} must be a whole number from {least} on, got {asked!r}.")
    return int(asked)
