"""Methods that look at the latent grid alone."""

from __future__ import annotations

from ..recipe import Recipe
from ..stages.order.simple import Tiles
from ..stages.schedule import Schedule
from ..stages.select.grid import Circle, Radial, TileWindow
from ..stages.select.head_rules import HeadRules
from ..stages.select.static import Window
from ..stages.select.tile_simulator import cheapest_tile

Sizes = tuple[int | float, int | float, int | float]


def na(
    window: Sizes = (1.0, 0.4, 0.4),
    dense_fraction: float = 0.2,
) -> Recipe:
    """Neighbourhood attention (NATTEN; arXiv 2204.07143): a window that slides with every query.

    Defaults are this package's: all frames and 0.4 of height and width (NATTEN leaves the window to the
    user), a fifth of the steps dense.

    Deviations: tokens sit in packed 3-D tiles, and blocks at a window's edge are masked by token; text reads
    and is read in full.

    Args:
        window: keys seen per dimension, in tokens (int) or as a share (float).
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return gna(window=window, stride=(1, 1, 1), dense_fraction=dense_fraction)


def dina(
    window: Sizes = (1.0, 0.4, 0.4),
    dilation: tuple[int, int, int] = (1, 2, 2),
    dense_fraction: float = 0.2,
) -> Recipe:
    """Dilated neighbourhood attention (arXiv 2209.15001): a window over every n-th key.

    Defaults are this package's, as those of :func:`na`, with a dilation of 2 in height and width.

    Tokens are grouped by the dilation, and tiled in their group, so that a query's blocks are of its own group.

    Deviations: those of :func:`na`.

    Args:
        window, dense_fraction: see :func:`na`; window times dilation may not exceed the grid.
        dilation: distance between the keys of a window, per dimension.
    """
    return gna(window=window, stride=(1, 1, 1), dilation=dilation, dense_fraction=dense_fraction)


def gna(
    window: Sizes = (1.0, 0.4, 0.4),
    stride: tuple[int, int, int] = (1, 4, 4),
    dilation: tuple[int, int, int] = (1, 1, 1),
    tile: tuple[int, int, int] | str = (4, 4, 4),
    grid: tuple[int, int, int] | None = None,
    dense_fraction: float = 0.2,
) -> Recipe:
    """Generalised neighbourhood attention (arXiv 2504.16922): window, stride and dilation.

    Defaults are this package's, as those of :func:`na`, with a stride of one tile in height and width. ``tile="auto"``
    takes the tile for which the kernel reads the fewest blocks on ``grid``; the window is the same under each. Tokens
    are grouped by the dilation before they are tiled.

    Deviations: those of :func:`na`.

    Args:
        window, dense_fraction: see :func:`na`.
        stride: queries that share a window, per dimension.
        dilation: distance between the keys of a window, per dimension.
        tile: order of the tokens, or "auto".
        grid: latent frames, height and width in tokens, for ``tile="auto"``.

    Raises:
        ValueError: "auto" without a grid, or a grid on which the window does not fit.
    """
    select = Window(window=window, stride=stride, dilation=dilation)
    if isinstance(tile, str):
        if tile != "auto" or grid is None:
            raise ValueError(f"tile must be three sizes, or 'auto' with a grid, got {tile!r} and grid {grid}.")
        tile = cheapest_tile(grid, select)
    return Recipe(
        order=Tiles(tile, dilation),
        select=select,
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def masformer(
    window: Sizes = (1.0, 0.4, 0.4),
    full_layers: tuple[int, ...] = (0, 1),
    dense_fraction: float = 0.2,
) -> Recipe:
    """Full attention in a few layers, a window in all others (MASFormer, arXiv 2310.12442).

    The first layers are full, as in the paper; how many there are, and the window, are this package's defaults.

    Deviations: those of :func:`gna`, whose windows of 3-D tiles stand for the paper's of one dimension; it is not
    trained from the start.

    Args:
        window, dense_fraction: see :func:`na`.
        full_layers: self-attention layers that stay dense, by index; negative counts from the last.
    """
    return Recipe(
        order=Tiles(),
        select=Window(window=window, stride=(1, 4, 4)),
        schedule=Schedule(dense_fraction=dense_fraction, dense_layers=full_layers),
    )


def sta(
    window: tuple[int, int, int] = (3, 3, 3),
    tile: tuple[int, int, int] = (6, 8, 8),
    dense_fraction: float = 0.3,
) -> Recipe:
    """Sliding tile attention (STA, arXiv 2502.04507): a window of whole tiles around the query's tile.

    Defaults of the paper: tiles of (6, 8, 8) tokens, 15 of 50 steps dense, and of its windows (3, 3, 3).

    Deviations: one window for all heads (the paper searches one per head and step); any grid, not only the
    three that its kernel supports: tiles at the far border are smaller.

    Args:
        window: tiles seen per dimension.
        tile: latent tokens of a tile per dimension.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return Recipe(
        order=Tiles(tile),
        select=TileWindow(window=window, tile=tile),
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def clear(radius: float = 16.0, dense_fraction: float = 0.0) -> Recipe:
    """CLEAR (arXiv 2412.16112): a disc around each query, for image models.

    Defaults of the paper: a radius of 16 of its 8, 16 and 32 latent tokens, sparse in every step. The paper
    fine-tunes; without training images suffer.

    Deviations: on video the disc reaches through all frames; tokens sit in packed tiles; without the optional
    down-sampled copy of keys and values.

    Args:
        radius: in latent tokens; keys at a smaller distance are seen.
        dense_fraction: share of the denoising steps that stay dense at the start.
    """
    return Recipe(
        order=Tiles(),
        select=Circle(radius=radius),
        schedule=Schedule(dense_fraction=dense_fraction),
    )


def radial(
    decay: float = 0.2,
    min_width: int = 64,
    dense_fraction: float = 0.24,
    dense_layers: tuple[int, ...] = (0,),
) -> Recipe:
    """Radial attention (arXiv 2506.19852): a static mask whose spatial band narrows with temporal distance.

    Defaults of the released code for Wan: decay 0.2, the first layer and 12 of 50 steps dense, the first
    frame read by all.

    Deviations from the code, towards the paper's formula: widths follow the true number of tokens per frame,
    not the next power of two; decay counts also where far frames are thinned out, and the smallest band is a
    field (64, one key block) instead of a fixed 128; the mask is exact to the token, where the code keeps a
    block by the fill of its columns; nothing is cut off at the end of the sequence, and a mask belongs to
    its own grid.

    Args:
        decay, min_width: see :class:`~dit_accel.stages.select.grid.Radial`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        dense_layers: self-attention layers that stay dense.
    """
    return Recipe(
        select=Radial(decay=decay, min_width=min_width),
        schedule=Schedule(dense_fraction=dense_fraction, dense_layers=dense_layers),
    )


def patterns(
    rules: tuple[tuple[str, ...], ...] = (("near 0.25 hw",),),
    dense_fraction: float = 0.2,
    dense_at: tuple[float, ...] = (),
    block: tuple[int, int] = (128, 64),
) -> Recipe:
    """A static pattern for each head, found offline (MoA, DuoAttention, S2-Attention).

    The blocks nearest in some dimensions of the grid, windows, cells, strided shards, or everything, in 3-D tiles;
    planning costs nothing. ``dit-accel search --rules`` finds a rule for each head by its measured error. The default
    is a column through all frames for all heads.

    With ``dense_at`` what the patterns leave out is carried as in :func:`carried`: the last step of the dense phase and
    one at each point say what that is, and it is added, less and less, in the steps after them. A shorter dense phase
    does then: ``patterns(dense_fraction=0.1, dense_at=(0.2, 0.5))``.

    Args:
        rules: per layer and head, see :class:`~dit_accel.stages.select.head_rules.HeadRules`.
        dense_fraction: share of the denoising steps that stay dense at the start.
        dense_at: progress of the run, from 0 to 1, at which a step is dense besides; none carries nothing.
        block: tokens in a query and in a key block.
    """
    recipe = Recipe(
        order=Tiles(),
        select=HeadRules(rules=rules, block=block),
        schedule=Schedule(dense_fraction=dense_fraction),
    )
    if not dense_at:
        return recipe
    return recipe.with_fields(
        {
            "schedule.refresh_at": (0.0, *dense_at),
            "schedule.dense_refresh": True,
            "schedule.plan_in_dense_phase": True,
            "schedule.own_dense": True,
            "compensate": "carried",
            "compensate.lasts": 1.0,
        }
    )
