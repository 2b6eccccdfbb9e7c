"""Whole runs: recipe, reuse and schedule chosen together."""

from __future__ import annotations

from dataclasses import replace

from ..recipe import Recipe
from ..stages.reuse.energy import Energy
from ..stages.reuse.listed import Listed
from ..stages.reuse.protocol import Reuse
from .searched import mass

# Steps of a run of 30. The first lie closer: there a skipped step costs most. Chosen by eight prompts of the embedded
# model that no table reports (docs/reuse.md), as is how they go on between them.
NUM_STEPS = 30
BALANCED_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 23, 26, 28, 29)
FAST_STEPS = (0, 1, 2, 4, 6, 9, 12, 16, 20, 24, 27, 29)
MAX_STEPS = (0, 1, 3, 6, 11, 17, 22, 26, 28)
SLOPE, CORRECTION = 0.5, 1.0


def balanced(
    density: float = 0.3, dense_fraction: float = 0.2, threshold: float | None = None, means: bool = True
) -> Recipe:
    """A whole run at a fidelity that few eyes tell from dense: 17 of 30 steps, with sparse attention.

    :func:`mass` with means of what it leaves out, in a list of steps. Between them what the blocks added goes on in a
    line of half its slope, and what that was off is made good in the next gap
    (:class:`~dit_accel.stages.reuse.continuation.Continuation`).

    Args:
        density: kept share of the latent blocks.
        dense_fraction: share of the denoising steps, from the first, whose attention is dense where it is computed.
        threshold: of SeaCache, which then chooses the steps of each run in place of the list; see
            :class:`~dit_accel.stages.reuse.energy.Energy`. It fits one checkpoint's numbers, and not all models.
        means: see :func:`mass`.
    """
    return _profile(density, dense_fraction, threshold, means, BALANCED_STEPS)


def fast(
    density: float = 0.2, dense_fraction: float = 0.1, threshold: float | None = None, means: bool = True
) -> Recipe:
    """A whole run of 12 steps of 30, with sparse attention behind the third.

    Args:
        density, dense_fraction, threshold, means: see :func:`balanced`.
    """
    return _profile(density, dense_fraction, threshold, means, FAST_STEPS)


def maximal(
    density: float = 0.25, dense_fraction: float = 0.034, threshold: float | None = None, means: bool = True
) -> Recipe:
    """A whole run for the least time, where a draft is enough: 9 steps of 30, of which two have dense attention.

    Args:
        density, dense_fraction, threshold, means: see :func:`balanced`.
    """
    return _profile(density, dense_fraction, threshold, means, MAX_STEPS)


def _profile(
    density: float, dense_fraction: float, threshold: float | None, means: bool, computed: tuple[int, ...]
) -> Recipe:
    if threshold is None:
        reuse: Reuse = Listed(computed, NUM_STEPS, order=1, slope=SLOPE, correction=CORRECTION)
    else:
        reuse = Energy(threshold, order=1, max_skipped=4)
    recipe = mass(density, dense_fraction, means=means).with_fields({"schedule.own_dense": True})
    return replace(recipe, reuse=reuse)
