"""The tile simulator against a count over all token pairs."""

import itertools
from math import prod

import pytest

from dit_accel.layout import TokenLayout
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.static import Window
from dit_accel.stages.select.tile_simulator import choose, planned_cost, simulate
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
