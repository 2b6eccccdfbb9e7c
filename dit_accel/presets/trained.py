"""Methods whose quality comes from a short fine-tuning; see :mod:`dit_accel.training`."""

from __future__ import annotations

from ..recipe import Recipe
from ..stages.compensate.coarse import CoarseBranch
from ..stages.compensate.linear import LinearBranch
from ..stages.order.cubes import Cubes
from ..stages.order.simple import Raster, Tiles
from ..stages.select.learned import Learned
from ..stages.select.pooled import Pooled


def sla(
    density: float = 0.05,
    negligible_share: float = 0.1,
    feature_map: str = "softmax",
    form: str = "paper",
    block: tuple[int, int] = (64, 64),
    tile: tuple[int, int, int] | None = None,
) -> Recipe:
    """SLA (arXiv 2509.24006): softmax over critical blocks, linear attention over marginal ones.

    Defaults of the paper: 5% of the blocks critical, the lowest 10% negligible, blocks of 64, softmax
    feature map, sparse in every step, raster order. Without training the linear branch adds nothing.

    Deviations: a query block always reads its own tokens; text is always critical.

    A sequence of a few thousand tokens has too few blocks of 64 to choose from: 5% of 72 are 4. There blocks of 16
    that are 3-D tiles hold much more of the attention at the same density (docs/finetuning.md); take them with
    ``form="all_tokens"``, since sums for each block cost ``head_dim / (2 * 16 * 16)`` of dense attention.

    Args:
        density: share of the latent blocks that are critical.
        negligible_share, feature_map, form: see :class:`~dit_accel.stages.compensate.linear.LinearBranch`.
        block: tokens in a query and in a key block, 16 to 128.
        tile: 3-D tile of latent tokens (frames, height, width) that makes a block, such as (4, 2, 2) for 16; None
            is raster order.
    """
    return Recipe(
        order=_order(tile),
        select=Pooled(density=density, block=block),
        compensate=LinearBranch(form=form, feature_map=feature_map, negligible_share=negligible_share),
    )


def sparge2(
    density: float = 0.03,
    top_p: float = 0.2,
    block: tuple[int, int] = (128, 64),
    tile: tuple[int, int, int] | None = None,
) -> Recipe:
    """SpargeAttention2 (arXiv 2602.13515): union of top-k and top-p, made good by distilling velocities.

    Defaults of the paper for 480p: the best 3% of the blocks and those that hold 0.2 of the pooled softmax
    mass, blocks of 128 queries and 64 keys, sparse in every step, raster order. Train it with the
    "distill" objective.

    Deviations: a query block always reads its own tokens; text is always read.

    Args:
        density, top_p, block: see :class:`~dit_accel.stages.select.pooled.Pooled`.
        tile: see :func:`sla`.
    """
    return Recipe(order=_order(tile), select=Pooled(density=density, top_p=top_p, block=block))


def ssa(density: float = 0.1, block: tuple[int, int] = (64, 64), tile: tuple[int, int, int] | None = None) -> Recipe:
    """Sparse attention trained beside full attention, each aligned with the other (SSA, arXiv 2511.20102).

    The paper is on language models (16 blocks of 16 tokens, a gate); its way of training carries over: train
    this plain top-k selection with the "ssa" objective. The defaults are this package's.

    Args:
        density, block: see :class:`~dit_accel.stages.select.pooled.Pooled`.
        tile: see :func:`sla`.
    """
    return Recipe(order=_order(tile), select=Pooled(density=density, block=block))


def seer(density: float = 0.1, rank: int = 24, block: tuple[int, int] = (128, 64), form: str = "pooled") -> Recipe:
    """Key blocks by a gate that learns the exact attention mass (SeerAttention, arXiv 2410.13276).

    A gate of each head scores pairs of 3-D tiles by pooled queries and keys, through projections of a low rank that
    know where tiles lie on the grid, in every step. Without training it chooses as ``pooled`` does. Train it with the
    "gate" objective, which leaves the model as it is: ``--objective gate --train learned``.

    Deviations: the scores of pooled queries and keys are added; queries and keys come with their own rotary embedding,
    before which the paper pools; a query block always reads its own tokens; text is always read.

    Args:
        density, rank, block: see :class:`~dit_accel.stages.select.learned.Learned`.
        form: likewise; "pooled" is the paper's, others are those of Sparsifiner, SEA and dynamic mask attention.
    """
    return Recipe(order=Tiles(), select=Learned(density=density, rank=rank, block=block, form=form))


def vsa(density: float = 0.1, cube: tuple[int, int, int] = (4, 4, 4)) -> Recipe:
    """Video Sparse Attention (VSA, arXiv 2505.13389): cubes of tokens that attend among their means, and in full to the
    best cubes.

    Defaults of the paper and its released code: cubes of 4 x 4 x 4 tokens, each a block of 64 queries and 64 keys, the
    best tenth of them by the product of cube means, sparse in every step. A cube at the far border of a grid has fewer
    tokens. Without training the coarse branch adds nothing.

    Deviations: text, which the released code does not know, reads and is read in full, and has no coarse branch; of the
    paper's two gates there is one, as in the released code.

    Args:
        density: share of the cubes that a cube reads in full.
        cube: latent tokens of a cube (frames, height, width), 16, 32, 64 or 128 in all.
    """
    volume = cube[0] * cube[1] * cube[2]
    return Recipe(
        order=Cubes(cube),
        select=Pooled(density=density, block=(volume, volume), keep_own=False),
        compensate=CoarseBranch(),
    )


def _order(tile: tuple[int, int, int] | None) -> Raster | Tiles:
    return Raster() if tile is None else Tiles(tile)
