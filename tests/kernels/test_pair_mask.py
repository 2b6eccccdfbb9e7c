"""A mask of token pairs over a plan's blocks, token by token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels.mask.pairs import PairMask
from tests.kernels.oracle import poison_unlisted
from tests.properties.drawn import DrawnMask, masks, normal, seeds


@st.composite
def plans(draw: st.DrawFn) -> DrawnMask:
    """Of sequences that attend to themselves."""
    return draw(masks().filter(lambda one: one.mask.block_k % 32 == 0))


@given(
    plans(), seeds, st.sampled_from((-1.5, 0.0, 1.5, 9.0)), st.sampled_from((None, "shared", "heads")), st.booleans()
)
def test_what_is_kept_is_what_both_show_and_no_query_is_left_with_nothing(
    drawn: DrawnMask, seed: int, hidden: float, order: str | None, structured: bool
):
    mask = drawn.mask
    batch, heads = drawn.keep.shape[:2]
    pairs = normal(seed, batch, 1, mask.q_len, mask.kv_len) > hidden
    if structured:  # whole stretches see each other
        stretch = normal(seed, max(mask.q_len, mask.kv_len)).gt(1).cumsum(0)
        pairs = (stretch[: mask.q_len, None] == stretch[: mask.kv_len])[None, None]
    rows = None
    if order is not None and mask.q_len == mask.kv_len:
        generator = torch.Generator().manual_seed(seed)
        number = heads if order == "heads" else 1
        rows = torch.stack([torch.randperm(mask.q_len, generator=generator) for _ in range(number)])[None]
        in_slots = pairs.expand(-1, number, -1, -1).take_along_dim(rows[..., None], 2)
        slots = in_slots.take_along_dim(rows[..., None, :], 3)
    else:
        slots = pairs
    found = PairMask.of(pairs, rows, mask.block_q, mask.block_k).over(mask, backend="torch")
    poison_unlisted(found)
    tokens = found.to_tokens().expand(batch, heads, -1, -1)
    shown, planned = slots.expand(batch, heads, -1, -1), drawn.tokens()
    both = shown & planned
    # A block of queries of which one lost all that it sees reads all that it sees.
    lost = shown.any(-1) & ~both.any(-1)
    block = torch.arange(mask.q_len) // mask.block_q
    any_lost = torch.stack([lost[..., block == i].any(-1) for i in range(mask.num_blocks[0])], -1)[..., block]
    expected = torch.where(any_lost[..., None], shown, both)
    assert torch.equal(tokens, expected)
    full = found.to_dense() & ~found.partial_to_dense()
    assert full.sum() == found.kv_num_full.sum()
