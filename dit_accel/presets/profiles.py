"""Whole runs: recipe, reuse and schedule chosen together."""

from __future__ import annotations

from dataclasses import replace

from ..recipe import Recipe
from ..stages.reuse.first_block import FirstBlock
from ..stages.reuse.listed import Listed
from ..stages.reuse.protocol import Reuse
from .searched import mass

# Steps of 30, about as many as a profile's threshold computes on the embedded model, the first ones closer, as SeaCache
# spaces them there. Start values.
BALANCED_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 29)
FAST_STEPS = (0, 1, 2, 3, 5, 8, 11, 14, 17, 20, 23, 26, 29)
MAX_STEPS = (0, 1, 2, 5, 9, 14, 19, 24, 29)


def balanced(
    density: float = 0.3,
    threshold: float = 0.06,
    dense_fraction: float = 0.2,
    listed: bool = False,
) -> Recipe:
    """A whole run at a fidelity that few eyes tell from dense: sparse attention in some two of three steps.

    :func:`mass` in the steps that First Block Cache computes. The error of both is little more than that of the
    larger one.

    Args:
        density: kept share of the latent blocks.
        threshold: see :class:`~dit_accel.stages.reuse.first_block.FirstBlock`. It fits one checkpoint's numbers;
            look at ``summary().computed_share`` with another.
        dense_fraction: share of the denoising steps, from the first, whose attention is dense where it is computed.
        listed: compute a fixed list of steps in place of the threshold's: for models whose threshold is not known,
            and for times that depend on no weights.
    """
    return _profile(density, dense_fraction, Listed(BALANCED_STEPS, 30, order=1) if listed else FirstBlock(threshold))


def fast(
    density: float = 0.3,
    threshold: float = 0.12,
    dense_fraction: float = 0.1,
    listed: bool = False,
) -> Recipe:
    """A whole run for less than a fifth of the attention: sparse attention in some two of five steps.

    As :func:`balanced`, with a higher threshold and fewer dense steps.

    Args:
        density, threshold, dense_fraction, listed: see :func:`balanced`.
    """
    return _profile(density, dense_fraction, Listed(FAST_STEPS, 30, order=1) if listed else FirstBlock(threshold))


def maximal(
    density: float = 0.2,
    threshold: float = 0.2,
    dense_fraction: float = 0.034,
    listed: bool = False,
) -> Recipe:
    """A whole run for the least time, where a draft is enough: sparse attention in some three of ten steps.

    As :func:`balanced`, at a lower density, with the first step alone dense.

    Args:
        density, threshold, dense_fraction, listed: see :func:`balanced`.
    """
    return _profile(density, dense_fraction, Listed(MAX_STEPS, 30, order=1) if listed else FirstBlock(threshold))


def _profile(density: float, dense_fraction: float, reuse: Reuse) -> Recipe:
    return replace(mass(density=density, dense_fraction=dense_fraction), reuse=reuse)
