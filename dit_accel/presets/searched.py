"""Methods that look at queries and keys."""

from __future__ import annotations

from ..recipe import Recipe
from ..stages.compensate.none import NoCompensation
from ..stages.compensate.pooled_mass import PooledMass
from ..stages.compensate.pyramid import KeyPyramid
from ..stages.compensate.residual import PooledResidual
from ..stages.order.axes import ChosenAxes, Chunks
from ..stages.order.curve import Curve
from ..stages.order.simple import Tiles
from ..stages.order.sorted import SortedSegments
from ..stages.schedule import Schedule
from ..stages.select.gate import GlobalGate
from ..stages.select.mass import FrozenMass, Mass
from ..stages.select.pooled import Pooled
from ..stages.select.rectified import Reallocated
from ..stages.select.sampled import Sampled
from ..stages.select.similarity_gate import GatedPooled

# Of a run of so many, a dense step is an eighth at least; distilled models take four to eight.
FEW_STEPS = 8


def mass(
    density: float = 0.2,
    dense_fraction: float = 0.2,
    block: tuple[int, int] = (128, 64),
    means: bool = False,
) -> Recipe:
    """Key blocks by their exact attention mass, searched once a run; AdaSpa's search (arXiv 2502.21079) in 3-D tiles.

    The last dense step searches: its attention gives the log-sum-exp of every query, one more pass over the scores
    the mass of every pair of blocks, and the plan serves to the end. It is kept as a bit a pair.

    Differs from :func:`adaspa` in the order (tiles, whose tokens read alike; the paper has the raster), in one
    density for all heads (the paper's rule loses more than it gains on the embedded model, docs/fidelity.md), in
    larger blocks, which the kernels are fastest at, and in searching within the dense phase in place of after it.
    Outside a pipeline, where no step is known, a plan serves 40 forwards.

    Args:
        density: kept share of the latent blocks.
        dense_fraction: share of the denoising steps that stay dense at the start, the search's with them: at least
            one step is dense, and none in a run without guidance of at most eight steps, whose first step searches and
            is sparse.
        block: tokens in a query and in a key block.
        means: blocks left out count by one mean each, in one softmax with the kept keys, see
            :class:`~dit_accel.stages.compensate.residual.PooledResidual`.
    """
    return Recipe(
        order=Tiles(),
        select=Mass(density=density, head_adaptive=False, block=block),
        compensate=PooledResidual() if means else NoCompensation(),
        schedule=Schedule(
            dense_fraction=dense_fraction,
            refresh_at=(0.0,),  # a run has passed it before its first plan, so that one is all
            dense_refresh=True,
            plan_in_dense_phase=True,
            refresh_every=_forwards_of_a_plan(dense_fraction, 1),
            few_steps=FEW_STEPS,
        ),
    )


def recycled(density: float = 0.2, full_every: int = 5, block: tuple[int, int] = (128, 64)) -> Recipe:
    """Full attention in turn with what it last found (Recycled Attention, arXiv 2411.05787).

    One step of every ``full_every``, the first of a run among them, is dense, and searches: the blocks with the most
    exact attention mass are those that the next steps read. Defaults are this package's.

    Deviations: the paper recycles single keys of a decoder, and has no blocks; here they are 3-D tiles, which a query
    block shares; a query block always reads its own tokens; text is always read.

    Args:
        density: kept share of the latent blocks.
        full_every: denoising steps from one dense step to the next, that one included.
        block: tokens in a query and in a key block.
    """
    return Recipe(
        order=Tiles(),
        select=Mass(density=density, head_adaptive=False, block=block, cache_lse=False),
        schedule=Schedule(refresh_every=full_every, dense_refresh=True),
    )


def ear(
    density: float = 0.2,
    dense_fraction: float = 0.2,
    budget: str = "layer",
    block: tuple[int, int] = (128, 64),
    means: bool = False,
) -> Recipe:
    """Error-aware routing, after SVG-EAR (arXiv 2603.08982): blocks by what the output would lose without them.

    As :func:`mass`, with another ranking: the exact mass of a pair of blocks times the distance between the key
    block's mean value and the query block's mean output, and with one budget for all rows and heads of a layer, so
    that it goes where it saves most. It takes the time of :func:`mass` at the same density.

    Deviations: blocks are tiles, where the paper has clusters of keys and queries; masses are exact and of one search
    a run, where the paper estimates them at each step; what is left out is left out without ``means``, where the
    paper reads its centroids; there is no exponent on a block's size, since blocks are of one size.

    Args:
        density: kept share of the latent blocks of a layer.
        dense_fraction: see :func:`mass`.
        budget: "layer", "head" or "row", see :class:`~dit_accel.stages.select.mass.Mass`.
        block: tokens in a query and in a key block.
        means: see :func:`mass`.
    """
    return mass(density, dense_fraction, block, means).with_fields({"select.score": "error", "select.budget": budget})


def carried(
    density: float = 0.2,
    dense_at: tuple[float, ...] = (0.2, 0.5),
    lasts: float = 1.0,
    block: tuple[int, int] = (64, 64),
    query_stride: int = 4,
    means: bool = False,
) -> Recipe:
    """A few dense steps, and between them sparse attention with what it left out in the last one: :func:`ear`'s blocks,
    and the residual of DiTFastAttn (arXiv 2406.08552).

    The first two steps of thirty and one at each point of ``dense_at`` are dense, and all but the first search. What
    their plan would have left out is added in the steps after them, less and less. It keeps a tensor like the output
    for each layer and guidance branch: 0.1 GB for 32,760 tokens of 12 heads of 128, 0.7 GB for 118,800 of 24; half of
    it with ``compensate.bits=8``.

    Deviations: the paper has a fixed window, carries its residual unweighted to the next full step, and finds the steps
    by a search; here blocks follow content, and the weight falls with age.

    Args:
        density: kept share of the latent blocks of a layer.
        dense_at: progress of the run, from 0 to 1, at which a step is dense besides the first.
        lasts: share of the run's steps after which nothing is added.
        block: tokens in a query and in a key block.
        query_stride: one of so many queries of a block is asked in a search.
        means: what is carried comes on top of the means of the blocks left out, see
            :class:`~dit_accel.stages.compensate.carried.Carried`.
    """
    return ear(density, dense_fraction=0.034, block=block).with_fields(
        {
            "schedule.refresh_at": (0.0, *dense_at),
            "schedule.own_dense": True,
            "select.cache_lse": False,  # an older one would say that rows whose logits grew matter more
            "select.query_stride": query_stride,
            "compensate": "carried",
            "compensate.lasts": lasts,
            "compensate.means": means,
        }
    )


def adaspa(
    density: float = 0.2,
    search_at: tuple[float, ...] = (0.2,),
    head_adaptive: bool = True,
    block: tuple[int, int] = (64, 64),
) -> Recipe:
    """AdaSpa (arXiv 2502.21079): exact block mass, searched online once or a few times in a run.

    Defaults of the paper: density 0.2, blocks of 64, a search after a fifth of the steps, dense before it and
    during it, head-adaptive density, later searches with the first one's log-sum-exp, text always read, raster
    order. The step of the first search runs this package's dense kernel, whose log-sum-exp the search takes, as
    the paper fuses the two.

    Deviations: the paper, in 50 steps, searches again at step 30, ``search_at=(0.2, 0.6)``, which its own
    ablation finds worth 0.1 dB. A search costs about 0.7 of a dense attention; in 30 steps one comes to some 3 %
    of the attention that the sparse steps replace, two to some 6 %. A query block always reads its own tokens;
    above a density of 2/3 heads shift by less, so that none exceeds 1. The paper's listing prints Log where it
    means exp.

    Args:
        density: mean kept share of the latent blocks.
        search_at: progress of the searches; dense until the first.
        head_adaptive: see :class:`~dit_accel.stages.select.mass.Mass`.
        block: tokens in a query and in a key block.
    """
    return Recipe(
        select=Mass(density=density, head_adaptive=head_adaptive, block=block),
        schedule=_searches(search_at),
    )


def paro(
    density: float = 0.3,
    sparse_weight: float = 0.5,
    precision: str = "int8",
    dense_fraction: float = 0.2,
    block: tuple[int, int] = (64, 64),
) -> Recipe:
    """PAROAttention (arXiv 2506.16054): axis orders and block masks from a calibration, INT8 products.

    Needs a calibration: ``patch(pipe, "paro", calibration=file)``, see :func:`dit_accel.calibrate`. Defaults of
    the paper: one of six axis orders per head, tiles of 64, density 0.3 of its 0.2, 0.3 and 0.5, masks by the
    exact block mass averaged over the prompts, several for the first half of the steps and one for the
    second, smoothed INT8 queries and keys.

    Deviations: the published score prefers dense tiles, its sign is corrected here, and its weight, which the
    paper does not give, is a field; masks belong to noise levels, not to step numbers; the last blocks are
    not forced, since they are masked by length, but own blocks are read; the masks serve both guidance
    branches; weights and values stay in the model's dtype (``precision="int8_fp8"`` has them in FP8; the paper
    has integers), and there is no INT4.

    Args:
        density: kept share of the latent blocks.
        sparse_weight: see :class:`~dit_accel.stages.order.axes.ChosenAxes`.
        precision: "int8", "int8_fp8" or "model".
        dense_fraction: share of the denoising steps that stay dense at the start.
        block: tokens in a query and in a key block.
    """
    recipe = Recipe(
        order=ChosenAxes(sparse_weight=sparse_weight),
        select=Mass(density=density, head_adaptive=False, block=block),
        schedule=Schedule(dense_fraction=dense_fraction),
    )
    return recipe.with_fields({"precision": precision})


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
        top_p, density, similarity, block: see :class:`~dit_accel.stages.select.similarity_gate.GatedPooled`.
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
    refresh_every: int = 4,
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """VMoBA (arXiv 2506.23858): chunks in time, space and both in turn, and one threshold per head.

    Defaults of the released code: threshold 0.25, per head ("head_global"), the first quarter of the steps
    dense when nothing is trained. Chunk shapes are this package's.

    Deviations: the gate is that of a query block's mean query, where the paper gates every query on its own,
    and a key block stands for a chunk: about 64 tokens, where the paper has some 72 chunks in all, so the
    choice is finer in keys and coarser in queries. Text takes no part in the gates and is read in full; a
    key block may straddle two chunks at a ragged border; attention over own and chosen chunks is one
    softmax, where the paper merges two by their log-sum-exp (the same numbers); a plan serves four steps, since
    gates cost 13 % of the attention that they save at 480p.

    The shared gate costs little where blocks are compact: on the built-in model (4608 tokens, 3 layers, chunks
    of 64, density 0.2; ``benchmarks/vmoba_forms.py --steps 2 --layers 1 4 6``, CPU) queries gated singly keep
    0.705 of the attention mass with a relative output error of 0.277, blocks of 64 queries 0.694 and 0.278,
    blocks of 128 queries 0.682 and 0.271.

    Args:
        threshold, block: see :class:`~dit_accel.stages.select.gate.GlobalGate`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        temporal, spatial, volume: see :class:`~dit_accel.stages.order.axes.Chunks`.
        refresh_every: denoising steps that share one plan.
    """
    return Recipe(
        order=Chunks(temporal=temporal, spatial=spatial, volume=volume),
        select=GlobalGate(threshold=threshold, block=block),
        schedule=Schedule(dense_fraction=dense_fraction, refresh_every=refresh_every),
    )


def pbs(
    top_p: float = 0.9,
    segment: tuple[int, int, int] = (4, 8, 8),
    samples: int = 128,
    dense_fraction: float = 0.2,
    refresh_every: int = 2,
) -> Recipe:
    """PBS-Attn (arXiv 2510.21270): keys sorted by attention inside segments, then pooled selection.

    As in the paper 0.9 of the pooled softmax mass is kept, and keys are sorted while queries stay. Samples, block
    sizes (128 queries, 64 keys; the paper has 128) and the dense phase are this package's. The paper's segments are
    of 1,024 tokens of a long text, which is ``segment=(4, 16, 16)``; of a clip's tokens smaller ones lose less, and
    none loses as little as tiles without sorting, which are the preset ``pooled`` (docs/fidelity.md).

    Deviations: there is no causality; a sample of queries over the whole grid stands for the paper's last
    query block; queries lie in tiles; no segment is read in full for being a query's own, and nothing makes the first
    token special; a plan serves two steps.

    Args:
        top_p: softmax mass to keep.
        segment, samples: see :class:`~dit_accel.stages.order.sorted.SortedSegments`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        refresh_every: denoising steps that share one plan.
    """
    return Recipe(
        order=SortedSegments(segment=segment, samples=samples),
        # Its own place holds other keys than a query block's.
        select=Pooled(density=None, top_p=top_p, keep_own=False),
        schedule=Schedule(dense_fraction=dense_fraction, refresh_every=refresh_every),
    )


def rectified(
    density: float = 0.15,
    top_p: float = 0.2,
    dense_fraction: float = 0.2,
    dense_layers: tuple[int, ...] = (0, 1),
    gain_aware: bool = True,
    refresh_every: int = 2,
) -> Recipe:
    """Rectified SpaAttn (arXiv 2511.19835): pooled shares that count tokens, and pooled values for the rest.

    As the released code has it: blocks of 128, the first frame, a segment of its own, and neighbouring blocks always
    read, the first two layers and (of 50, on Wan) the first ten steps dense, gain-aware rectification. Its least
    share of blocks is 0.25 and its ``top_p`` 0.3, which what is always read comes on top of; the paper's runs of Wan
    read 0.16 to 0.20 of the blocks. The defaults read 0.20 of Wan's at 81 frames of 832 x 480 where attention is
    peaked, and at most 0.25 where it is even.

    Deviations: neighbours are the blocks before and after in the order, a generalised Hilbert curve; text has
    its own share but does not count towards ``top_p``, and may be of any length; an image has no first frame
    to read; inputs are not changed in place, and any batch size runs. A plan serves two steps, and keeps its shares.

    Args:
        density, top_p: see :class:`~dit_accel.stages.select.rectified.Reallocated`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        dense_layers: self-attention layers that stay dense.
        gain_aware: see :class:`~dit_accel.stages.compensate.pooled_mass.PooledMass`.
        refresh_every: denoising steps that share one plan.
    """
    return Recipe(
        order=Curve(first_frame_apart=True),
        select=Reallocated(density=density, top_p=top_p),
        compensate=PooledMass(gain_aware=gain_aware),
        schedule=Schedule(dense_fraction=dense_fraction, dense_layers=dense_layers, refresh_every=refresh_every),
    )


def psa(
    cumulative: tuple[float, float, float, float] = (0.5, 0.6, 0.7, 0.8),
    min_full: float = 0.06,
    similarity: tuple[float, ...] = (0.7, 0.65, 0.6),
    dense_fraction: float = 0.24,
    refresh_every: int = 8,
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """Pyramid sparse attention (PSA, ziplab): blocks of little importance are read at a lower resolution.

    Defaults of the released code for Wan2.1-1.3B by energy: bounds .5/.6/.7/.8, at least 0.06 of the blocks
    in full, similarity gate .7/.65/.6, a quarter of the tokens sampled, 12 of 50 steps dense, a space-filling
    curve. For Wan2.1-14B: ``psa(cumulative=(0.4, 0.5, 0.6, 0.8), similarity=())``. The code's blocks are 128;
    64 keys are this package's default.

    Deviations: a plan serves eight steps, since a quarter of the queries on a quarter of the keys is a sixteenth
    of all logits, read twice: up to a quarter of a dense attention for every plan; the sampled places are the same
    in every block and step; importance is summed over a block; a block that crosses a bound gets the finer
    level; counts of a level are not rounded to whole hardware tiles, since the kernel does not need it; fixed
    quotas in place of energy are not offered as a preset.

    Args:
        cumulative, similarity: see :class:`~dit_accel.stages.compensate.pyramid.KeyPyramid`.
        min_full: least share of the latent key blocks that is read in full.
        dense_fraction: share of the denoising steps that stay dense at the start.
        refresh_every: denoising steps that share one plan.
        block: tokens in a query and in a key block.
    """
    return Recipe(
        order=Curve(),
        # What both choose to read in full is the same sample's choice.
        select=Sampled(density=min_full, top_p=max(cumulative[0], 1e-6), block=block),
        compensate=KeyPyramid(cumulative=cumulative, similarity=similarity),
        schedule=Schedule(dense_fraction=dense_fraction, refresh_every=refresh_every),
    )


def _searches(search_at: tuple[float, ...]) -> Schedule:
    """Dense until the first search and during each; nothing is refreshed in between."""
    first = min(search_at)
    return Schedule(
        dense_fraction=first,
        refresh_at=search_at,
        dense_refresh=True,
        refresh_every=_forwards_of_a_plan(first, len(search_at)),
    )


def _forwards_of_a_plan(dense_fraction: float, searches: int) -> int:
    """What a plan serves in a run of 50 steps, for a bare transformer, which knows no progress."""
    return max(1, round(50 * (1 - dense_fraction) / searches))
