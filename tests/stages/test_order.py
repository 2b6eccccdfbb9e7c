import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.stages.order.simple import Raster, Tiles

LAYOUTS = [
    TokenLayout((4, 8, 8), 0, 256),
    TokenLayout((3, 5, 7), 0, 105),
    TokenLayout((3, 5, 7), 11, 116),
    TokenLayout((3, 5, 7), 0, 118),
    TokenLayout((1, 9, 13), 4, 130),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_are_contiguous_and_the_rest_follows(layout):
    order = Tiles((2, 4, 4))
    rows = order.rows(layout, torch.device("cpu")).tolist()
    assert sorted(rows) == list(range(layout.seq_len))
    frames, height, width = layout.grid
    tile = (2, 4, 4) if frames > 1 else (1, 8, 4)
    seen: list[tuple[int, int, int]] = []
    for token in rows[: layout.num_latent]:
        latent = token - layout.latent_start
        assert 0 <= latent < layout.num_latent
        f, h, w = latent // (height * width), latent // width % height, latent % width
        here = (f // tile[0], h // tile[1], w // tile[2])
        if not seen or seen[-1] != here:
            assert here not in seen, "a tile is entered twice"
            seen.append(here)
    extras = rows[layout.num_latent :]
    assert extras == sorted(extras)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_of_a_dilation_are_tiled_each_by_itself(layout):
    gaps = (1, 2, 3)
    rows = Tiles((2, 2, 2), gaps).rows(layout, torch.device("cpu")).tolist()
    assert sorted(rows) == list(range(layout.seq_len))
    frames, height, width = layout.grid
    tile = (2, 2, 2) if frames > 1 else (1, 4, 2)
    seen: list[tuple[int, ...]] = []
    for token in rows[: layout.num_latent]:
        latent = token - layout.latent_start
        place = (latent // (height * width), latent // width % height, latent % width)
        group = tuple(x % gap for x, gap in zip(place, gaps, strict=True))
        here = (*group, *(x // gap // size for x, gap, size in zip(place, gaps, tile, strict=True)))
        if not seen or seen[-1] != here:
            assert here not in seen, "a tile is entered twice"
            seen.append(here)
    groups = [here[:3] for here in seen]
    assert groups == sorted(groups)
    assert len(set(groups)) == 6
    plain = Tiles((2, 2, 2), (1, 1, 1)).rows(layout, torch.device("cpu"))
    assert torch.equal(plain, Tiles((2, 2, 2)).rows(layout, torch.device("cpu")))


def test_raster_is_the_order_of_the_model():
    assert Raster().rows(LAYOUTS[1], torch.device("cpu")) is None


def test_a_tile_shape_is_three_sizes():
    with pytest.raises(ValueError, match="three tile sizes"):
        Tiles((4, 4))
    with pytest.raises(ValueError, match="at least 1"):
        Tiles((4, 0, 4))
    with pytest.raises(ValueError, match=r"order\.dilation must be three distances of at least 1, got \(1, 0, 1\)"):
        Tiles((4, 4, 4), (1, 0, 1))
