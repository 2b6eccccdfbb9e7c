"""A preset: a name for a recipe, with options."""

from __future__ import annotations

import dit_accel
from dit_accel.stages.schedule import Schedule

from .compensation import MeanValue
from .order import Serpentine
from .selection import Strided


@dit_accel.register("strided_snake")
def strided_snake(every: int = 8, strength: float = 0.1, dense_fraction: float = 0.2) -> dit_accel.Recipe:
    """Near blocks and every nth, in serpentine order, with the mean value for the rest.

    Args:
        every: see :class:`Strided`.
        strength: see :class:`MeanValue`.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return dit_accel.Recipe(
        order=Serpentine(),
        select=Strided(every=every),
        compensate=MeanValue(strength=strength),
        schedule=Schedule(dense_fraction=dense_fraction),
    )
