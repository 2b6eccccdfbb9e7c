"""Which steps show what a static pattern loses where it carries what it left out: dense ones, and steps after them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layout import StepContext
from ..recipe import Recipe
from ..stages.compensate.carried import Carried
from ..stages.schedule import DENSE_PHASE
from .recording import spread_steps


@dataclass(frozen=True)
class CarriedStep:
    """A step of a run.

    Attributes:
        index: from 0.
        share: of what was left out of the last dense step that is added; None in a dense step.
    """

    index: int
    share: float | None


def carried_steps(recipe: Recipe, steps: int, samples: int, first: int = 0) -> list[CarriedStep]:
    """So many sparse steps of a run, spread over it, and before them the dense steps that they carry from.

    Args:
        recipe: whose compensation is :class:`~dit_accel.stages.compensate.carried.Carried`.
        steps: of the run.
        first: the first step that the transformer runs; of two experts the second begins late, with a dense step.

    Raises:
        ValueError: all steps are dense.
    """
    assert isinstance(recipe.compensate, Carried)
    dense_of = _dense_before(recipe, first, steps)
    sparse = [index for index, dense in dense_of.items() if dense != index]
    if not sparse:
        raise ValueError(f"No step of {steps} is sparse under this recipe: give more steps.")
    found: dict[int, CarriedStep] = {}
    for place in spread_steps(steps, samples, recipe.schedule.dense_fraction):
        index = min(sparse, key=lambda one, place=place: (abs(one - place), -one))  # type: ignore[misc]
        dense = dense_of[index]
        found[dense] = CarriedStep(dense, None)
        found[index] = CarriedStep(index, max(0.0, 1.0 - (index - dense) / steps / recipe.compensate.lasts))
    return [found[index] for index in sorted(found)]


def _dense_before(recipe: Recipe, first: int, steps: int) -> dict[int, int]:
    """Of each step after the dense phase the last dense one, which may be itself."""
    schedule = replace(recipe.schedule, dense_layers=())
    made: StepContext | None = None
    found: dict[int, int] = {}
    for index in range(first, steps):
        step = StepContext(index=index, num_steps=steps, forward_id=index, guided=True)
        if schedule.dense_reason(step, 0, 1) == DENSE_PHASE:
            continue
        if made is None or schedule.needs_plan(step, made):
            made = step
        assert made.index is not None
        found[index] = made.index
    return found
