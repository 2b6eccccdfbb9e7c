from dataclasses import replace

import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.static import Window
from tests.calls import call_of
from tests.stages.oracle import window_tokens

CPU = torch.device("cpu")
CASES = [
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 5, 5), (1, 2, 3), (1, 1, 1)),
    ((3, 4, 4), (3, 4, 4), (1, 1, 1)),
    ((1, 3, 2), (1, 1, 1), (2, 2, 3)),
    ((2, 2, 4), (1, 2, 2), (1, 3, 2)),
    ((3, 1, 1), (1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout((3, 7, 9), 0, 189),
        TokenLayout((3, 7, 9), 13, 202),
        TokenLayout((3, 7, 9), 0, 196),
        TokenLayout((3, 8, 8), 0, 192),
    ],
    ids=["alone", "text first", "text last", "even"],
)
@pytest.mark.parametrize(("window", "stride", "dilation"), CASES, ids=str)
def test_the_mask_is_exact_to_the_token(window, stride, dilation, layout, order):
    select = Window(window=window, stride=stride, dilation=dilation, block=(64, 32))
    rows = order.rows(layout, CPU)
    blocks = SequenceBlocks(layout, rows, *select.block, CPU)
    q = torch.empty(1, layout.seq_len, 1, 8)
    mask = select.select(blocks, select.prepare(blocks), call_of(q, q))
    permuted = torch.arange(layout.seq_len) if rows is None else rows.long()
    expected = window_tokens(layout, window, stride, dilation)[permuted][:, permuted]
    assert torch.equal(mask.to_tokens()[0, 0], expected)
    read_whole = replace(select, whole=True)
    assert select.hides_tokens
    assert not read_whole.hides_tokens
    whole = read_whole.select(blocks, read_whole.prepare(blocks), call_of(q, q))
    first_q, first_k = (torch.arange(layout.seq_len) // size for size in select.block)
    touched = [
        [bool(expected[first_q == i][:, first_k == j].any()) for j in range(whole.num_blocks[1])]
        for i in range(whole.num_blocks[0])
    ]
    assert torch.equal(whole.to_tokens()[0, 0], torch.tensor(touched)[first_q][:, first_k])


def test_first_frame_sink():
    layout = TokenLayout((4, 6, 6), 0, 150)
    select = Window(window=(1, 3, 3), sink_first_frame=True, block=(32, 32))
    blocks = SequenceBlocks(layout, None, 32, 32, CPU)
    q = torch.empty(1, 150, 1, 8)
    mask = select.select(blocks, select.prepare(blocks), call_of(q, q))
    assert torch.equal(mask.to_tokens()[0, 0], window_tokens(layout, (1, 3, 3), sink_first_frame=True))


def test_a_key_mask_drops_hidden_blocks_and_marks_partial_ones():
    layout = TokenLayout((2, 8, 8), 0, 192)
    select = Window(window=(2, 8, 8), block=(64, 32))
    blocks = SequenceBlocks(layout, None, 64, 32, CPU)
    key_mask = torch.ones(2, 192, dtype=torch.bool)
    key_mask[0, 140:] = False
    q = torch.empty(2, 192, 1, 8)
    mask = select.select(blocks, select.prepare(blocks), call_of(q, q, key_mask=key_mask))
    assert mask.to_dense()[0, 0].any(0).tolist() == [True] * 5 + [False]
    assert mask.to_dense()[1].all()
    assert mask.kv_num_full[0, 0].tolist() == [4, 4, 4]
    assert mask.kv_num_full[1, 0].tolist() == [6, 6, 6]


def test_shares_follow_the_grid():
    tables = Window(window=(1.0, 0.5, 0.34)).visibility((5, 8, 9))
    assert [int(table.sum(1).unique()) for table in tables] == [5, 4, 4]


def test_repeated_token_masks_are_stored_once():
    layout = TokenLayout((1, 64, 64), 0, 4096)
    select = Window(window=(1, 9, 9), block=(64, 64))
    rows = Tiles((1, 8, 8)).rows(layout, CPU)
    blocks = SequenceBlocks(layout, rows, 64, 64, CPU)
    tables = select.prepare(blocks)
    assert len(tables.token_bits) < 90 < int((tables.bit_rows >= 0).sum())


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"window": (9, 3, 3)}, (4, 8, 8), "spans 9 tokens, but the grid has 4 in frames"),
        ({"window": (2, 3, 3), "dilation": (1, 1, 4)}, (4, 8, 8), "spans 12 tokens.* in width"),
        ({"window": (2, 3, 3), "stride": (1, 5, 1)}, (4, 8, 8), "at most the window, 3, in height, got 5"),
    ],
)
def test_windows_that_do_not_fit_the_grid(changes, grid, message):
    with pytest.raises(ValueError, match=message):
        Window(**changes).visibility(grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (0, 3, 3)}, "select.window must hold ints"),
        ({"window": (1.5, 3, 3)}, "select.window must hold ints"),
        ({"window": (3, 3)}, "needs three values"),
        ({"stride": (0, 1, 1)}, "select.stride must be at least 1"),
        ({"block": (128, 48)}, "select.block must be two of"),
    ],
)
def test_impossible_windows(changes, message):
    with pytest.raises(ValueError, match=message):
        Window(**changes)
