"""Methods that leave no block out: other numbers, or other tokens in between."""

from __future__ import annotations

from ..recipe import Recipe
from ..stages.compensate.agent import AgentTokens
from ..stages.precision import Int8, Int8Fp8
from ..stages.schedule import Schedule
from ..stages.select.static import FullSelect


def sage(
    values: str = "model",
    smooth_q: bool = False,
    key_scales: str = "block",
    rotate: bool = False,
    dense_fraction: float = 0.0,
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """SageAttention (arXiv 2410.02367, 2411.10958): dense attention with 8-bit products.

    Defaults of the first paper: INT8 queries and keys in blocks of 128 and 64, smoothed keys, values and
    weights in the model's dtype, in every step. ``sage(values="fp8", smooth_q=True)`` has the second one's
    FP8 values and smoothed queries.

    Deviations: queries have a scale per token (the papers: per block, or per group of threads); keys have one
    per block, or the second paper's four a block with ``key_scales="thread"``; weights and values accumulate
    in float32, on GeForce cards in float16 over a tile of keys; INT4 is not offered. ``rotate=True`` is QuaRot's
    (arXiv 2404.00456).

    Args:
        values: "model" or "fp8", the numbers of values and weights.
        smooth_q: see :class:`~dit_accel.stages.precision.Int8`.
        key_scales, rotate: likewise.
        dense_fraction: share of the denoising steps, from the first, that stay in the model's numbers.
        block: tokens in a query and in a key block.
    """
    if values not in ("model", "fp8"):
        raise ValueError(f'sage: values must be "model" or "fp8", got {values!r}.')
    numbers = Int8 if values == "model" else Int8Fp8
    precision = numbers(smooth_q=smooth_q, key_scales=key_scales, rotate=rotate)
    return Recipe(select=FullSelect(block), precision=precision, schedule=Schedule(dense_fraction=dense_fraction))


def agent(
    tile: tuple[int, int, int] = (2, 2, 2),
    sharpen: float = 0.3,
    shortcut: float = 0.075,
    dense_fraction: float = 0.2,
) -> Recipe:
    """Agent attention (arXiv 2312.08874), in its training-free form for diffusion (AgentSD).

    Defaults of AgentSD: an exponent of 0.3 on the scale towards the agents, 0.075 of the values added. The
    tile and the dense phase are this package's.

    Deviations: agents are the mean queries of 3-D tiles, where AgentSD merges tokens by similarity and
    projects them; keys are not merged; text queries attend as before. Merging is a reference form in
    ``benchmarks/agent_forms.py``: agents by similarity lose a little less, merged keys more.

    Args:
        tile, sharpen, shortcut: see :class:`~dit_accel.stages.compensate.agent.AgentTokens`.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return Recipe(
        select=FullSelect(),
        compensate=AgentTokens(tile=tile, sharpen=sharpen, shortcut=shortcut),
        schedule=Schedule(dense_fraction=dense_fraction),
    )
