"""A block mask is the same in every form that it has."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dit_accel.kernels import BlockMask
from dit_accel.kernels.mask.packed import PackedBlockMask, pack_bits, unpack_bits
from dit_accel.kernels.mask.transpose import transpose_mask
from tests.kernels.oracle import visible_tokens
from tests.properties.drawn import DrawnMask, masks, times


def entries(mask: BlockMask) -> list[tuple[list[int], list[int], list[int] | None]]:
    """(full blocks, partial blocks, rows of their token bits) of every row, as listed."""
    found = []
    counts, fulls = mask.kv_num_blocks.flatten().tolist(), mask.kv_num_full.flatten().tolist()
    indices = mask.kv_indices.flatten(0, 2).tolist()
    bits = [None] * len(counts) if mask.kv_bits is None else mask.kv_bits.flatten(0, 2).tolist()
    for count, full, row, held in zip(counts, fulls, indices, bits, strict=True):
        found.append((row[:full], row[full:count], None if held is None else held[full:count]))
    return found


@times(3)
@given(masks())
def test_the_lists_are_the_map(drawn: DrawnMask):
    mask = drawn.mask
    assert torch.equal(mask.to_dense(), drawn.keep)
    assert float(mask.density()) == pytest.approx(float(drawn.keep.float().mean()), abs=1e-6)
    rows = [part.flatten(0, 2) for part in (drawn.keep, drawn.partial, drawn.bit_rows)]
    for found, keep, partial, bits in zip(entries(mask), *rows, strict=True):
        some = partial.nonzero()[:, 0].tolist()
        assert found[0] == (keep & ~partial).nonzero()[:, 0].tolist()
        assert found[1] == some
        assert found[2] is None or found[2] == bits[some].tolist()


@times(3)
@given(masks())
def test_tokens_are_those_of_the_blocks(drawn: DrawnMask):
    expected = drawn.tokens()
    assert torch.equal(drawn.mask.to_tokens(), expected)
    # The oracle of the kernels' tests reads the lists, one after the other.
    assert torch.equal(visible_tokens(drawn.mask), expected)


@times(3)
@given(masks())
def test_trimming_and_moving_change_nothing(drawn: DrawnMask):
    for mask in (drawn.mask.trimmed(), drawn.mask.to("cpu"), drawn.mask.trimmed().trimmed()):
        assert entries(mask) == entries(drawn.mask)
        assert torch.equal(mask.to_tokens(), drawn.tokens())
    assert drawn.mask.trimmed().kv_indices.shape[-1] == max(1, int(drawn.keep.sum(-1).max()))


@times(3)
@given(masks(bits=False))
def test_a_packed_mask_unpacks_to_the_same_lists(drawn: DrawnMask):
    found = PackedBlockMask.of(drawn.mask, key_mask=True).lists()
    assert entries(found) == entries(drawn.mask)
    assert (found.block_q, found.block_k, found.q_len, found.kv_len) == (
        drawn.mask.block_q,
        drawn.mask.block_k,
        drawn.mask.q_len,
        drawn.mask.kv_len,
    )
    # Without a key mask only a short last block is partial.
    plain = BlockMask.from_dense(
        drawn.keep, drawn.mask.block_q, drawn.mask.block_k, drawn.mask.q_len, drawn.mask.kv_len
    )
    assert entries(PackedBlockMask.of(plain, key_mask=False).lists()) == entries(plain)


@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=1, max_dims=3, max_side=20)))
def test_bits_unpack_to_what_was_packed(values: np.ndarray):
    keep = torch.from_numpy(values)
    bits = pack_bits(keep)
    assert bits.shape == (*keep.shape[:-1], -(-keep.shape[-1] // 8))
    assert torch.equal(unpack_bits(bits, keep.shape[-1]), keep)
    for j in range(keep.shape[-1]):
        assert torch.equal((bits[..., j // 8] >> j % 8 & 1).bool(), keep[..., j])


def turned(mask: BlockMask) -> BlockMask:
    """The mask seen from its keys, as a mask."""
    lists = transpose_mask(mask)
    return BlockMask(
        lists.q_num_blocks,
        lists.q_indices,
        lists.q_num_full,
        mask.block_k,
        mask.block_q,
        mask.kv_len,
        mask.q_len,
        lists.q_bits,
        mask.token_bits,
    )


@times(3)
@given(masks(), st.booleans())
def test_a_transposed_mask_is_the_transposed_map(drawn: DrawnMask, trimmed: bool):
    mask = drawn.mask.trimmed() if trimmed else drawn.mask
    other = turned(mask)
    assert torch.equal(other.to_dense(), drawn.keep.transpose(-1, -2))
    rows = [part.transpose(-1, -2).flatten(0, 2) for part in (drawn.keep, drawn.partial, drawn.bit_rows)]
    for found, keep, partial, bits in zip(entries(other), *rows, strict=True):
        some = partial.nonzero()[:, 0].tolist()
        assert found[0] == (keep & ~partial).nonzero()[:, 0].tolist()
        assert found[1] == some
        assert found[2] is None or found[2] == bits[some].tolist()
    assert entries(turned(other)) == entries(drawn.mask)
