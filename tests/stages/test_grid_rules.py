"""STA, CLEAR and radial attention against their definitions, token by token."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.grid import Circle, Radial, TileWindow
from tests.calls import call_of
from tests.stages.block_oracle import CPU, LAYOUTS, half_hidden


def _tokens(layout, sees, sink=False):
    """bool ``[S, S]``: latents by ``sees``, everything else in full."""
    places = list(itertools.product(*map(range, layout.grid)))
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    for (i, q), (j, k) in itertools.product(enumerate(places), enumerate(places)):
        seen = sees(q, k) or (sink and k[0] == 0)
        mask[layout.latent_start + i, layout.latent_start + j] = seen
    return mask


def _check(select, layout, order, expected):
    rows = order.rows(layout, CPU)
    slots = torch.arange(layout.seq_len) if rows is None else rows.long()
    blocks = SequenceBlocks(layout, rows, *select.block, CPU)
    tables = select.prepare(blocks)
    q = torch.empty(2, layout.seq_len, 2, 8)
    mask = select.select(blocks, tables, call_of(q, q))
    assert torch.equal(mask.to_tokens()[0, 0], expected[slots][:, slots])
    read_whole = replace(select, whole=True)
    assert select.hides_tokens
    assert not read_whole.hides_tokens
    whole = read_whole.select(blocks, read_whole.prepare(blocks), call_of(q, q))
    assert torch.equal(whole.to_dense(), mask.to_dense())
    block_of = [torch.arange(layout.seq_len) // size for size in select.block]
    assert torch.equal(whole.to_tokens()[0, 0], mask.to_dense()[0, 0][block_of[0]][:, block_of[1]])
    if layout.num_extra:
        key_mask = half_hidden(layout)
        whole = read_whole.select(blocks, read_whole.prepare(blocks), call_of(q, q, key_mask=key_mask))
        alive = key_mask[:, slots]
        some = torch.stack([alive[:, block_of[1] == j].any(1) for j in range(whole.num_blocks[1])], 1)
        assert torch.equal(whole.to_dense()[:, 0], mask.to_dense()[:, 0] & some[:, None])
        hidden = select.select(blocks, tables, call_of(q, q, key_mask=key_mask))
        seen = hidden.to_tokens()[:, 0] & key_mask[:, None, slots]
        assert torch.equal(seen, expected[slots][:, slots] & key_mask[:, None, slots])


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 3), (1, 2, 2), (9, 9, 1)], ids=str)
def test_sta(name, order, window):
    layout, tile = LAYOUTS[name], (2, 3, 2)
    tile_on_grid = tile if layout.grid[0] > 1 else (1, 3, 4)

    def one(q, k, length, size, width):
        tiles = math.ceil(length / size)
        first = min(max(q // size - width // 2, 0), max(tiles - width, 0))
        return first <= k // size < first + width

    def sees(q, k):
        return all(map(one, q, k, layout.grid, tile_on_grid, window))

    select = TileWindow(window=window, tile=tile, block=(64, 32))
    _check(select, layout, order, _tokens(layout, sees))


def test_sta_on_an_even_grid_masks_no_block_by_token():
    layout = LAYOUTS["even"]
    blocks = SequenceBlocks(layout, Tiles((2, 4, 4)).rows(layout, CPU), 32, 32, CPU)
    tables = TileWindow(window=(1, 1, 2), tile=(2, 4, 4), block=(32, 32)).prepare(blocks)
    assert torch.equal(tables.keep, tables.full)


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("radius", [1.0, 3.0, 4.5])
def test_clear(name, order, radius):
    layout = LAYOUTS[name]

    def sees(q, k):
        return math.dist(q[1:], k[1:]) < radius - 1e-9

    _check(Circle(radius=radius, block=(64, 32)), layout, order, _tokens(layout, sees))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("grid", [(9, 3, 4), (6, 5, 3)], ids=str)
@pytest.mark.parametrize(("decay", "min_width"), [(1.0, 1), (0.4, 1), (0.5, 5), (1.0, 32)], ids=str)
def test_radial(grid, decay, min_width, sink):
    layout = type(LAYOUTS["even"])(grid, 3, math.prod(grid) + 7)
    per_frame = grid[1] * grid[2]

    def sees(q, k):
        apart = abs(q[0] - k[0])
        if apart <= 1:
            return True
        width = decay * per_frame / 2 ** math.floor(math.log2(apart))
        if width < min_width:
            if apart % math.ceil(min_width / width):
                return False
            width = min_width
        return abs((q[1] - k[1]) * grid[2] + q[2] - k[2]) + 1 <= width

    select = Radial(decay=decay, min_width=min_width, sink_first_frame=sink, block=(32, 32))
    _check(select, layout, Raster(), _tokens(layout, sees, sink))


def test_radial_work_grows_by_n_log_n():
    """Doubling the frames adds about one band of full width, so density falls."""
    pairs = []
    for frames in (16, 32, 64, 128):
        bands = Radial(decay=1.0, min_width=1).widths((frames, 32, 32))
        pairs.append(sum(2 * (frames - d) * min(band, 1024) for d, band in enumerate(bands)))
    per_frame = [count / frames for count, frames in zip(pairs, (16, 32, 64, 128), strict=True)]
    steps = [after - before for before, after in itertools.pairwise(per_frame)]
    assert max(steps) < 1.5 * min(steps), "each doubling adds as much work per frame"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TileWindow, {"window": (0, 1, 1)}, "select.window must be three sizes"),
        (TileWindow, {"tile": (4, 4)}, "select.tile must be three sizes"),
        (Circle, {"radius": 0.0}, "select.radius must be above 0"),
        (Radial, {"decay": 1.5}, r"select.decay must lie in \(0, 1\]"),
        (Radial, {"min_width": 0}, "select.min_width must be at least 1"),
    ],
)
def test_impossible_rules(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


@pytest.mark.parametrize("select", [Circle(radius=3.0, sink_first_frame=True, block=(32, 32))], ids=["circle"])
def test_an_image_has_no_first_frame_to_sink_to(select):
    layout = LAYOUTS["image"]
    blocks = SequenceBlocks(layout, None, 32, 32, CPU)
    assert not select.prepare(blocks).keep.all()
    assert not blocks.first_frame_k.any()
