"""Axis orders, chunks and the curve; orders per head through the whole engine."""

import itertools

import pytest
import torch

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.order.axes import AXIS_ORDERS, AxisOrder, Chunks
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.mass import FrozenMass, Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.similarity_gate import GatedPooled
from dit_accel.stages.select.static import Window
from tests.calls import attend
from tests.stages.block_oracle import (
    CPU,
    LAYOUTS,
    best,
    half_hidden,
    inputs,
    per_head,
    selected,
    views,
)
from tests.stages.oracle import masked_attention, window_tokens

MIXED = AxisOrder((("wfh", "fhw", "hwf"),))


def _places(rows, layout):
    """Grid coordinates in slot order, and the tokens behind them."""
    _, height, width = layout.grid
    latent = [token - layout.latent_start for token in rows[: layout.num_latent]]
    return [(n // (height * width), n // width % height, n % width) for n in latent]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("axes", AXIS_ORDERS)
def test_axis_orders(axes, name):
    layout = LAYOUTS[name]
    rows = AxisOrder(((axes,),)).rows(layout, CPU)
    if axes == "fhw":
        assert rows is None
        return
    sides = dict(zip("fhw", layout.grid, strict=True))
    expected = [
        tuple(dict(zip(axes, place, strict=True))[axis] for axis in "fhw")
        for place in itertools.product(*(range(sides[axis]) for axis in axes))
    ]
    assert _places(rows.tolist(), layout) == expected
    assert sorted(rows.tolist()) == list(range(layout.seq_len))


def test_axis_orders_differ_by_layer_and_head():
    order = AxisOrder((("fhw", "hwf"), ("wfh",), ("fhw", "fhw")))
    layout = LAYOUTS["text first"]
    first = order.rows(layout, CPU, 0)
    assert first.shape == (2, layout.seq_len)
    assert first[0].tolist() == [*range(13, 202), *range(13)]
    assert torch.equal(first[1], AxisOrder((("hwf",),)).rows(layout, CPU))
    assert order.rows(layout, CPU, 1).shape == (layout.seq_len,)
    assert order.rows(layout, CPU, 2) is None
    assert len({order.variant(layer) for layer in range(3)}) == 3
    with pytest.raises(ValueError, match="names 3 layers, the model has a layer 3"):
        order.rows(layout, CPU, 3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_turn_with_the_layer(name):
    layout = LAYOUTS[name]
    frames, height, width = layout.grid
    order = Chunks(temporal=2, spatial=(3, 4), volume=(2, 2, 5))
    shapes = [(2, height, width), (frames, 3, 4), (2, 2, 5)]
    assert order.variant(1) == order.variant(4) != order.variant(2)
    for layer in range(6):
        rows = order.rows(layout, CPU, layer).tolist()
        assert sorted(rows) == list(range(layout.seq_len))
        chunk = [
            tuple(x // size for x, size in zip(place, shapes[layer % 3], strict=True))
            for place in _places(rows, layout)
        ]
        entered = [here for here, _ in itertools.groupby(chunk)]
        assert len(entered) == len(set(entered)), "a chunk must be contiguous"


@pytest.mark.parametrize(
    "grid", [(4, 8, 8), (3, 5, 7), (1, 9, 13), (2, 1, 7), (1, 1, 9), (7, 7, 7), (13, 30, 45)], ids=str
)
def test_the_curve_visits_everything_in_small_steps(grid):
    layout = TokenLayout(grid, 0, grid[0] * grid[1] * grid[2])
    places = _places(Curve().rows(layout, CPU).tolist(), layout)
    assert sorted(places) == list(itertools.product(*map(range, grid)))
    steps = [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(places)]
    assert max(map(max, steps)) == 1, "no step leaves the neighbourhood"
    diagonal = sum(sum(step) > 1 for step in steps)
    assert diagonal <= max(1, 0.05 * len(steps))  # a box with odd sides costs one
    if not any(side % 2 for side in grid):
        assert diagonal == 0


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 7), (1, 9, 13)], ids=str)
def test_the_first_frame_is_a_segment_of_the_curve(grid):
    """The tokens of one frame come first, on a curve of their own, then those of the others, on theirs."""
    per_frame = grid[1] * grid[2]
    layout = TokenLayout(grid, 7, 7 + grid[0] * per_frame)
    places = _places(Curve(first_frame_apart=True).rows(layout, CPU).tolist()[: grid[0] * per_frame], layout)
    assert sorted(places) == list(itertools.product(*map(range, grid)))
    assert {frame for frame, _, _ in places[:per_frame]} == {0}
    for segment in (places[:per_frame], places[per_frame:]):
        for pair in itertools.pairwise(segment):
            assert max(abs(a - b) for a, b in zip(*pair, strict=True)) == 1


def test_blocks_of_the_curve_are_compact():
    layout = TokenLayout((12, 30, 44), 0, 12 * 30 * 44)

    def spread(order):
        rows = order.rows(layout, CPU)
        tokens = torch.arange(layout.seq_len) if rows is None else rows.long()
        places = torch.stack([tokens // (30 * 44), tokens // 44 % 30, tokens % 44], -1).double()
        blocks = places[: layout.seq_len // 100 * 100].view(-1, 100, 3)
        return float(blocks.var(1).sum(-1).mean())

    # 100 is no tile size: tiles are cut badly, the curve does not mind.
    assert spread(Curve()) < 0.75 * spread(Tiles()) < spread(Raster())


def test_an_order_per_head_must_fit_the_heads():
    layout = LAYOUTS["alone"]
    q, k = inputs(layout, heads=2)
    engine = Engine(Recipe(order=MIXED, select=Pooled(block=(32, 32))), ["layer"], "auto", 0)
    with pytest.raises(ValueError, match="order of layer 0 is for 3 heads, the layer has 2"):
        attend(engine, 0, AttentionInputs(q, k, k), layout, StepContext(), lambda: q)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_scored_selections_with_an_order_per_head(name, hidden):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = MIXED.rows(layout, CPU)
    grid = views(layout, rows, q, k, block, key_mask)

    def from_scores(scores):
        def choose(view):
            table = scores(view)
            return [
                best({j: table(i, j) for j in view.candidates}, 0.4) if view.candidates else set()
                for i in range(len(view.q_blocks))
            ]

        return per_head(choose, grid)

    def pooled(view):
        return lambda i, j: float(view.q[view.q_blocks[i]].mean(0) @ view.k[view.alive[j]].mean(0))

    def mass(view):
        sums = view.block_sums(view.probabilities())
        return lambda i, j: sums[i, j]

    def isolated(view):
        sums = view.block_sums(view.probabilities(view.latent))
        return lambda i, j: sums[i, j] / len(view.alive[j])

    cases = {
        Pooled(density=0.4, block=block): pooled,
        GatedPooled(density=0.4, top_p=None, similarity=-1.0, block=block): pooled,
        Mass(density=0.4, head_adaptive=False, block=block): mass,
        FrozenMass(density=0.4, block=block): isolated,
    }
    for select, scores in cases.items():
        assert torch.equal(selected(select, layout, rows, q, k, key_mask), from_scores(scores)), select


@pytest.mark.parametrize("order", [MIXED, Curve(), Chunks(1, (3, 3), (2, 3, 3))], ids=["per head", "curve", "chunks"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", ["alone", "text first", "text last"])
def test_windows_are_exact_in_any_order(name, order, hidden):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    key_mask = half_hidden(layout) if hidden else None
    recipe = Recipe(order=order, select=Window(window=(2, 3, 5), block=(64, 32)))
    engine = Engine(recipe, ["a", "b", "c"], "auto", 0)
    mask = window_tokens(layout, (2, 3, 5))
    if hidden:
        mask = mask & key_mask[:, None, None]
    expected = masked_attention(q, k, v, mask)
    for layer in range(3):
        out = attend(engine, layer, AttentionInputs(q, k, v, key_mask), layout, StepContext(), lambda: q)
        assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AxisOrder((("hhw",),)), "must hold fhw, fwh, hfw, hwf, wfh, whf, tiles, got 'hhw'"),
        (lambda: AxisOrder(()), "at least one layer"),
        (lambda: Chunks(temporal=0), "at least 1 token"),
    ],
)
def test_impossible_orders(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_orders_by_name():
    recipe = Recipe().with_fields({"order": "axes", "order.axes": "(('hwf', 'fhw'), ('whf',))"})
    assert recipe.order == AxisOrder((("hwf", "fhw"), ("whf",)))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe().with_fields({"order": "curve"}).order == Curve()


@pytest.mark.parametrize("grid", [(5, 6, 7), (1, 9, 10)])
def test_a_head_in_tiles_beside_a_head_in_an_axis_order(grid):
    layout = TokenLayout(grid, 3, 3 + grid[0] * grid[1] * grid[2] + 2)
    rows = AxisOrder((("tiles", "whf"),)).rows(layout, torch.device("cpu"))
    assert torch.equal(rows[0], Tiles((4, 4, 4)).rows(layout, torch.device("cpu")))
    assert torch.equal(rows[1], AxisOrder((("whf",),)).rows(layout, torch.device("cpu")))
