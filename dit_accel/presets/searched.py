"""Methods that look at queries and keys."""

from __future__ import annotations

from ..recipe import Recipe
from ..stages.order_axes import Chunks
from ..stages.schedule import Schedule
from ..stages.select_gate import GlobalGate
from ..stages.select_gated import GatedPooled
from ..stages.select_mass import FrozenMass, Mass


def adaspa(
    density: float = 0.2,
    search_at: tuple[float, ...] = (0.2, 0.6),
    head_adaptive: bool = True,
    block: tuple[int, int] = (64, 64),
) -> Recipe:
    """AdaSpa (arXiv 2502.21079): exact block mass, searched online a few times in a run.

    Defaults of the paper: density 0.2, blocks of 64, 50 steps with searches at steps 10 and 30, dense before
    the first and during each, head-adaptive density, later searches with the first one's log-sum-exp, text
    always read, raster order.

    Deviations: the first search makes two passes over the logits of its own, where the paper takes the
    log-sum-exp from the dense attention that it fuses the search with; a query block always reads its own
    tokens; above a density of 2/3 heads shift by less, so that none exceeds 1. The paper's listing prints
    Log where it means exp.

    Args:
        density: mean kept share of the latent blocks.
        search_at: progress of the searches; dense until the first.
        head_adaptive: see :class:`~dit_accel.stages.select_mass.Mass`.
        block: tokens in a query and in a key block.
    """
    return Recipe(
        select=Mass(density=density, head_adaptive=head_adaptive, block=block),
        schedule=_searches(search_at),
    )


def sparsed(density: float = 0.3, search_at: float = 0.2, block: tuple[int, int] = (128, 128)) -> Recipe:
    """SparseD (arXiv 2509.24014), from diffusion language models: one exact selection, frozen to the end.

    Defaults of the paper: density 0.3, blocks of 128, dense for the first fifth of the steps and during the
    search.

    Deviations: the paper ranks prompt columns and generated columns each in isolation; here latent columns
    are ranked in isolation, with a softmax of their own, and all others (text, references) are read in full.
    A query block always reads its own tokens.

    Args:
        density: kept share of the latent blocks.
        search_at: progress of the one search; dense until then.
        block: tokens in a query and in a key block.
    """
    return Recipe(select=FrozenMass(density=density, block=block), schedule=_searches((search_at,)))


def sparge(
    top_p: float | None = 0.98,
    density: float | None = None,
    similarity: float = 0.6,
    dense_fraction: float = 0.0,
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """SpargeAttn (arXiv 2502.18137): pooled scores behind a self-similarity gate.

    Defaults of the released code's cumulative variant: keep 0.98 of the pooled softmax mass, self-similarity
    above 0.6, blocks of 128 queries and 64 keys, keys smoothed before pooling, no dense phase, raster order.
    Its top-k variant (density 0.5) turns the gate off: ``sparge(top_p=None, density=0.5, similarity=-1.0)``.

    Deviations: the block that crosses ``top_p`` is kept, where the code stops before it; text columns stay
    outside the pooled softmax and the count, and are always read; a query block always reads its own tokens;
    a short last block is judged by the tokens it has, where the code divides zero by zero; no second,
    per-tile skipping of P·V inside the kernel (the code's default threshold turns it off in practice); the
    per-head tuning of thresholds is left to calibration.

    Args:
        top_p, density, similarity, block: see :class:`~dit_accel.stages.select_gated.GatedPooled`.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return Recipe(
        select=GatedPooled(density=density, top_p=top_p, similarity=similarity, block=block),
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def vmoba(
    threshold: float = 0.25,
    dense_fraction: float = 0.25,
    temporal: int = 1,
    spatial: tuple[int, int] = (4, 4),
    volume: tuple[int, int, int] = (4, 4, 4),
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """VMoBA (arXiv 2506.23858): chunks in time, space and both in turn, and one threshold per head.

    Defaults of the released code: threshold 0.25, per head ("head_global"), the first quarter of the steps
    dense when nothing is trained. Chunk shapes are this package's.

    Deviations: the gate is that of a query block's mean query, where the paper gates every query on its own,
    and a key block stands for a chunk: about 64 tokens, where the paper has some 72 chunks in all, so the
    choice is finer in keys and coarser in queries. Text takes no part in the gates and is read in full; a
    key block may straddle two chunks at a ragged border; attention over own and chosen chunks is one
    softmax, where the paper merges two by their log-sum-exp (the same numbers).

    Args:
        threshold, block: see :class:`~dit_accel.stages.select_gate.GlobalGate`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        temporal, spatial, volume: see :class:`~dit_accel.stages.order_axes.Chunks`.
    """
    return Recipe(
        order=Chunks(temporal=temporal, spatial=spatial, volume=volume),
        select=GlobalGate(threshold=threshold, block=block),
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def _searches(search_at: tuple[float, ...]) -> Schedule:
    """Dense until the first search and during each; nothing is refreshed in between."""
    return Schedule(dense_fraction=min(search_at), refresh_at=search_at, dense_refresh=True)
