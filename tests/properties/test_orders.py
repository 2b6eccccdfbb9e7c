"""Every order is a bijection, grid by grid, that keeps tokens on no grid last and in their own order."""

from __future__ import annotations

import itertools
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.recipe import ORDERS
from dit_accel.stages.order.axes import HEAD_ORDERS, AxisOrder, Chunks
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.protocol import Order
from dit_accel.stages.order.simple import Raster, Tiles, fold_tile
from dit_accel.stages.order.sorted import SortedSegments
from tests.calls import call_of
from tests.properties.drawn import layouts, normal, seeds

CPU = torch.device("cpu")
sizes = st.tuples(*[st.integers(1, 5)] * 3)
heads = st.lists(st.sampled_from(HEAD_ORDERS), min_size=1, max_size=3).map(tuple)
FIXED: dict[str, st.SearchStrategy[Order]] = {
    "raster": st.just(Raster()),
    "tiles": st.builds(Tiles, sizes),
    "axes": st.builds(AxisOrder, st.lists(heads, min_size=1, max_size=3).map(tuple)),
    "chunks": st.builds(Chunks, st.integers(1, 4), st.tuples(*[st.integers(1, 5)] * 2), sizes),
    "curve": st.builds(Curve, st.booleans()),
}
sorted_segments = st.builds(SortedSegments, sizes, st.integers(1, 200))


def test_these_are_all_orders():
    # The second is never asked for rows; the third expects padding, see tests/training/test_vsa.py.
    assert set(FIXED) | {"sorted", "chosen_axes", "cubes"} == set(ORDERS)


def assert_order(rows: torch.Tensor, layout: TokenLayout) -> None:
    assert rows.dtype == torch.int32
    assert rows.shape[-1] == layout.seq_len
    spans = [range(part.start, part.start + prod(part.grid)) for part in layout.grids]
    others = [token for token in range(layout.seq_len) if not any(token in span for span in spans)]
    for one in rows.reshape(-1, layout.seq_len).tolist():
        assert one[len(one) - len(others) :] == others
        at = 0
        for span in spans:
            assert sorted(one[at : at + len(span)]) == list(span)
            at += len(span)


@given(st.one_of(*FIXED.values()), layouts(), st.integers(0, 2))
def test_an_order_of_the_grid(order: Order, layout: TokenLayout, layer: int):
    layer = min(layer, len(order.axes) - 1) if isinstance(order, AxisOrder) else layer
    rows = order.rows(layout, CPU, layer)
    if rows is not None:
        assert_order(rows, layout)
    # Blocks and their places follow from it.
    blocks = SequenceBlocks(layout, rows, 16, 16, CPU)
    latent = blocks.latent_of_slot.reshape(-1, layout.seq_len)
    assert torch.equal(
        latent.sort(-1).values[:, layout.seq_len - layout.num_latent :],
        torch.arange(layout.num_latent).expand(len(latent), -1),
    )
    # Layers of equal variants may share what was made for one of them.
    for other in range(3):
        if not isinstance(order, AxisOrder) and order.variant(other) == order.variant(layer):
            again = order.rows(layout, CPU, other)
            assert (again is None and rows is None) or torch.equal(again, rows)


@given(
    sorted_segments,
    layouts(references=0),
    seeds,
    st.sampled_from(("all", "some", "none")),
    st.sampled_from((0.0, torch.nan, torch.inf)),
)
def test_an_order_of_a_call(order: SortedSegments, layout: TokenLayout, seed: int, seen: str, odd: float):
    q, k = normal(seed, 2, 2, layout.seq_len, 2, 8)
    k[1, seed % layout.seq_len, 0] += odd
    key_mask = None if seen == "all" else normal(seed, 2, layout.seq_len) > (0 if seen == "some" else 99)
    call = call_of(q, k, key_mask=key_mask)
    rows, keys = order.rows_of_call(layout, call), order.keys_of_call(layout, call)
    assert rows.shape == (layout.seq_len,)
    assert_order(rows, layout)
    assert keys.shape == (2, 2, layout.seq_len)
    tokens = torch.arange(layout.seq_len).expand_as(keys)
    assert torch.equal(keys.sort(-1).values, tokens.to(torch.int32))
    # What is hidden stays where it is, and so does what is no latent.
    latent = (tokens >= layout.latent_start) & (tokens < layout.latent_start + layout.num_latent)
    seen_keys = torch.ones(2, layout.seq_len, dtype=torch.bool) if key_mask is None else key_mask
    moves = keys != tokens
    assert not (moves & ~(latent & seen_keys[:, None])).any()
    # Of what moves, a segment of the grid is read whole before the next one begins.
    tile = fold_tile(order.segment, layout.grid[0])
    places = SequenceBlocks(layout, None, 16, 16, CPU).coordinates
    segment = sum(place // size * 10**n for n, (place, size) in enumerate(zip(places, tile, strict=True)))
    for b, h in itertools.product(range(2), range(2)):
        read = [token for token in keys[b, h, rows.long()].tolist() if latent[b, h, token] and seen_keys[b, token]]
        entered = [here for here, _ in itertools.groupby(segment[read].tolist())]
        assert len(entered) == len(set(entered)), "a segment is entered twice"


@given(sizes, st.integers(1, 5))
def test_a_folded_tile_holds_as_many_tokens(tile: tuple[int, int, int], frames: int):
    folded = fold_tile(tile, frames)
    assert folded[0] * folded[1] * folded[2] == tile[0] * tile[1] * tile[2]
    assert folded[0] <= frames or folded[0] % 2 == 1, "halved until it fits, or odd"
