"""The tile simulator against a count over all token pairs."""

import itertools
from math import prod

import pytest

from dit_accel import presets
from dit_accel.layout import TokenLayout
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.static import Window
from dit_accel.stages.select.tile_simulator import cheapest_tile, choose, planned_cost, simulate
from tests.stages.oracle import gna_visible, window_tokens

CASES = [
    ((3, 7, 9), (3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 2, 4), (1, 2, 4)),
    ((3, 7, 9), (2, 5, 6), (1, 2, 3), (1, 1, 1), (1, 4, 4), (1, 4, 2)),
    ((4, 8, 8), (2, 4, 4), (2, 4, 4), (1, 1, 1), (2, 4, 4), (2, 4, 4)),
    ((5, 6, 11), (2, 3, 2), (1, 2, 2), (2, 2, 5), (1, 2, 2), (2, 2, 1)),
    ((1, 13, 15), (1, 5, 7), (1, 5, 7), (1, 1, 1), (1, 4, 8), (1, 8, 4)),
    ((2, 5, 5), (2, 5, 5), (1, 1, 1), (1, 1, 1), (4, 4, 4), (4, 4, 4)),
]


def _counted(grid, window, stride, dilation, tile_q, tile_k):
    """Tile pairs with any visible token pair, and visible token pairs, one token pair at a time."""
    places = list(itertools.product(*map(range, grid)))

    def tile(place, shape):
        return tuple((x % d, x // d // t) for x, d, t in zip(place, dilation, shape, strict=True))

    pairs, visible = set(), 0
    for q, k in itertools.product(places, places):
        if all(map(gna_visible, q, k, grid, window, stride, dilation)):
            pairs.add((tile(q, tile_q), tile(k, tile_k)))
            visible += 1
    return len(pairs), visible


@pytest.mark.parametrize("case", CASES, ids=str)
def test_visited_tiles_are_counted_exactly(case):
    cost = simulate(*case)
    assert (cost.visited, cost.visible) == _counted(*case)
    assert cost.dense == -(-prod(case[0]) // prod(case[4])) * -(-prod(case[0]) // prod(case[5]))


def test_a_perfectly_block_sparse_window_loses_nothing():
    cost = simulate((16, 16, 16), (8, 8, 8), (8, 8, 8), (1, 1, 1), (4, 4, 8), (4, 4, 4))
    assert cost.speedup == cost.ideal_speedup == 8.0
    assert cost.efficiency == 1.0
    # a tile-sized stride, an odd number of tiles: sliding tile attention
    assert simulate((16, 32, 32), (12, 12, 12), (4, 4, 4), tile_q=(4, 4, 4), tile_k=(4, 4, 4)).efficiency == 1


@pytest.mark.parametrize("grid", [(5, 9, 7), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_the_choice_is_the_cheapest_of_all(grid, dilation):
    window, block = (2, 3, 4), (8, 4)
    choice = choose(grid, window, block, dilation)

    def shapes(size):
        return [s for s in itertools.product(range(1, size + 1), repeat=3) if prod(s) == size]

    cheapest = min(
        simulate(grid, window, stride, dilation, tile_q, tile_k).visited
        for stride in itertools.product(*(range(1, size + 1) for size in window))
        for tile_q in shapes(block[0])
        for tile_k in shapes(block[1])
    )
    assert choice.cost.visited == cheapest
    again = simulate(grid, choice.window, choice.stride, dilation, choice.tile_q, choice.tile_k)
    assert again == choice.cost
    assert all(a >= b for a, b in zip(choice.window, window, strict=True))
    for axis in range(3):
        larger = list(choice.window)
        larger[axis] += 1
        if larger[axis] * dilation[axis] <= grid[axis]:
            costlier = simulate(grid, tuple(larger), choice.stride, dilation, choice.tile_q, choice.tile_k)
            assert costlier.visited > cheapest, "the window could have grown for free"


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
def test_the_planned_cost_is_that_of_the_kernels_blocks(order):
    layout = TokenLayout((3, 7, 9), 0, 196)
    window = Window(window=(2, 3, 5), block=(64, 32))
    tokens = window_tokens(layout, (2, 3, 5))
    rows = order.rows(layout, "cpu")
    slots = list(range(196)) if rows is None else rows.tolist()
    blocks_q = [slots[n : n + 64] for n in range(0, 196, 64)]
    blocks_k = [slots[n : n + 32] for n in range(0, 196, 32)]
    visited = sum(bool(tokens[a][:, b].any()) for a in blocks_q for b in blocks_k)
    cost = planned_cost(layout, order, window)
    assert (cost.visited, cost.dense, cost.visible) == (visited, 4 * 7, int(tokens.sum()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (5, 3, 3)}, "at most the grid"),
        ({"stride": (1, 4, 1)}, "stride at most the window"),
        ({"tile_q": (0, 4, 4)}, "at least 1"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"grid": (4, 8, 8), "window": (3, 3, 3), **changes})


@pytest.mark.parametrize(
    ("grid", "window", "dilation"),
    [((4, 8, 8), (4, 3, 3), (1, 1, 1)), ((3, 7, 9), (2, 3, 5), (1, 1, 1)), ((4, 8, 8), (2, 2, 2), (1, 2, 1))],
    ids=str,
)
def test_the_cheapest_tile_reads_no_more_blocks_than_another(grid, window, dilation):
    select = Window(window=window, dilation=dilation, block=(64, 32))
    layout = TokenLayout(grid, 0, prod(grid))

    tokens = window_tokens(layout, window, (1, 1, 1), dilation)

    def read(tile):
        """Blocks that hold a visible pair, token by token."""
        slots = Tiles(tile, dilation).rows(layout, "cpu").tolist()
        blocks_q, blocks_k = ([slots[n : n + size] for n in range(0, len(slots), size)] for size in (64, 32))
        return sum(bool(tokens[a][:, b].any()) for a in blocks_q for b in blocks_k)

    found = cheapest_tile(grid, select)
    assert prod(found) == 32
    others = [s for s in itertools.product((1, 2, 4, 8, 16, 32), repeat=3) if prod(s) == 32]
    costs = {tile: read(tile) for tile in others}
    # A block that straddles two tiles is counted as a box, so that the choice is the cheapest, or nearly.
    assert costs[found] <= 1.1 * min(costs.values())
    assert costs[found] < max(costs.values())


def test_a_preset_takes_the_cheapest_tile_of_a_grid():
    recipe = presets.gna(tile="auto", grid=(8, 24, 24))
    assert recipe.order.shape == cheapest_tile((8, 24, 24), recipe.select) != (4, 4, 4)
    assert recipe.select == presets.gna().select
    costs = [planned_cost(TokenLayout((8, 24, 24), 0, 4608), order, recipe.select) for order in (recipe.order, Tiles())]
    assert costs[0].visited <= 0.86 * costs[1].visited
    assert costs[0].visible == costs[1].visible
    for options in ({"tile": "auto"}, {"tile": "best", "grid": (8, 24, 24)}):
        with pytest.raises(ValueError, match="three sizes, or 'auto' with a grid, got"):
            presets.gna(**options)


def test_grouped_tokens_read_their_own_group_alone():
    """A dilated window over groups costs what a plain one of its size does; mixed tiles read nearly everything."""
    recipe = presets.dina()
    assert recipe.order.dilation == recipe.select.dilation == (1, 2, 2)
    layout = TokenLayout((8, 24, 24), 0, 4608)
    grouped, mixed = (planned_cost(layout, order, recipe.select) for order in (recipe.order, Tiles()))
    assert grouped.visited == 0.25 * grouped.dense
    assert mixed.visited > 0.7 * mixed.dense
