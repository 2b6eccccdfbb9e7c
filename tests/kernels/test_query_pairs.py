"""Lists of two query blocks at a time against a loop over blocks, in torch and in the interpreted kernel."""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.mask.packed import PackedBlockMask
from dit_accel.kernels.mask.query_pairs import query_pairs

from .oracle import random_mask


def by_hand(mask, parts):
    """Of every (batch entry, head, query block) the full key blocks that only it lists, those of its pair, the partial
    ones with their rows of bits; of parts of blocks."""
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.kv_num_blocks.shape)).tolist():
        rows = []
        for row in (i, i ^ 1):
            full = []
            if row < mask.kv_num_blocks.shape[2]:
                full = mask.kv_indices[b, h, row, : mask.kv_num_full[b, h, row]].tolist()
            rows.append({block * parts + part for block in full for part in range(parts)})
        partial = []
        for slot in range(mask.kv_num_full[b, h, i], mask.kv_num_blocks[b, h, i]):
            bits = -1 if mask.kv_bits is None else int(mask.kv_bits[b, h, i, slot])
            for part in range(parts):
                word = -1 if bits < 0 else bits * parts + part
                partial.append((int(mask.kv_indices[b, h, i, slot]) * parts + part, word))
        yield (b, h, i), rows[0] - rows[1], rows[0] & rows[1], partial


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bits", [False, True], ids=["plain", "bits"])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("length", [64, 400, 750])
def test_what_both_list_comes_first(length, block_k, bits, backend):
    torch.manual_seed(length)
    mask = random_mask((2, 3), length, length + 100, 64, block_k, bits=bits, empty_rows=True)
    # Entries past a row's number mean nothing.
    past = torch.arange(mask.kv_indices.shape[-1]) >= mask.kv_num_blocks[..., None]
    mask.kv_indices[past] = 1 << 20
    found = query_pairs(mask, 64, backend)
    pairs = -(-mask.num_blocks[0] // 2)
    assert found.header.shape == (2, 3, pairs, 5)
    assert found.kv_indices.shape[:3] == (2, 3, 2 * pairs)
    assert found.header.dtype == found.kv_indices.dtype == torch.int32
    some = 0
    for (b, h, i), own, both, partial in by_hand(mask, block_k // 64):
        header = found.header[b, h, i // 2].tolist()
        number, full, shared = header[i % 2], header[2 + i % 2], header[4]
        assert number == len(own) + len(both) + len(partial)
        assert full == len(own) + len(both)
        assert shared == len(both)
        entries = found.kv_indices[b, h, i, :number].tolist()
        assert entries[:shared] == sorted(both)  # so in both rows alike
        assert set(entries[shared:full]) == own
        assert entries[full:] == [block for block, _ in partial]
        if bits:
            assert found.kv_bits[b, h, i, full:number].tolist() == [row for _, row in partial]
        some += len(both) * len(own)
    assert some > 0 or length == 64
    if mask.num_blocks[0] % 2:
        assert torch.all(found.header[:, :, -1, [1, 3, 4]] == 0)


@pytest.mark.parametrize("block_k", [64, 128])
def test_a_part_of_a_block_has_its_part_of_the_token_bits(block_k):
    torch.manual_seed(0)
    mask = random_mask((1, 2), 300, 300, 64, block_k, bits=True)
    found = query_pairs(mask, 64, "torch")
    parts = block_k // 64
    assert found.token_bits.shape == (len(mask.token_bits) * parts, 64, 2)
    for row, words in enumerate(found.token_bits):
        whole = mask.token_bits[row // parts].unflatten(1, (parts, 2))
        assert torch.equal(words, whole[:, row % parts])
    mask = random_mask((1, 2), 300, 300, 64, block_k)
    assert query_pairs(mask, 64, "torch").token_bits is None


def test_a_block_that_does_not_fall_into_such_parts_is_refused():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64, 128, 128)
    with pytest.raises(ValueError, match="block_k must divide the mask's 64, got 128"):
        query_pairs(mask, 128)


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "key_mask"])
@pytest.mark.parametrize("length", [64, 400, 750])
def test_a_packed_mask_is_unpacked_to_pairs(length, hidden, monkeypatch):
    """Both lists of a pair, the mask's own, and the header, as of the lists before packing."""
    monkeypatch.setattr("dit_accel.kernels.mask.packed.reads_pairs", lambda x: True)
    torch.manual_seed(length)
    keep = torch.rand(2, 3, -(-length // 64), -(-(length + 100) // 64)) < 0.5
    keep[:, 0, -1] = False
    partial = (torch.rand(keep.shape) < 0.3) & keep if hidden else None
    mask = BlockMask.from_dense(keep, 64, 64, length, length + 100, partial=partial, backend="torch")
    packed = PackedBlockMask.of(mask, hidden, backend="triton")
    unpacked = packed.lists()
    assert unpacked.paired is not None
    assert query_pairs(unpacked, 64, "triton") is unpacked.paired
    expected = query_pairs(mask, 64, "torch")
    assert torch.equal(unpacked.paired.header, expected.header)
    # As long as the longest row, and behind a row's last entry nothing is said.
    found, entries = unpacked.paired.kv_indices, expected.header[..., :2].flatten(2)
    listed = torch.arange(found.shape[-1]) < entries[..., None]
    assert found.shape[2] == expected.kv_indices.shape[2]
    assert torch.equal(found[listed], expected.kv_indices[..., : found.shape[-1]][listed])
    assert torch.equal(unpacked.kv_num_blocks, mask.kv_num_blocks)
    assert torch.equal(unpacked.kv_num_full, mask.kv_num_full)
    assert torch.equal(unpacked.to_dense(), mask.to_dense())
    assert torch.equal(unpacked.partial_to_dense(), mask.partial_to_dense())


def test_what_is_made_of_an_unpacked_mask_has_no_pairs(monkeypatch):
    monkeypatch.setattr("dit_accel.kernels.mask.packed.reads_pairs", lambda x: True)
    torch.manual_seed(0)
    mask = random_mask((1, 2), 500, 500, 64, 64)
    unpacked = PackedBlockMask.of(mask, False, backend="triton").lists()
    assert unpacked.paired is not None
    fewer = unpacked.for_queries(torch.arange(8) % 3 == 0)
    for made in (fewer, unpacked.trimmed(), unpacked.to("cpu"), replace(unpacked, q_len=499)):
        assert made.paired is None
    assert torch.equal(query_pairs(fewer, 64, "torch").header[..., 0], fewer.kv_num_blocks[..., ::2])
    # Halves of blocks are others.
    monkeypatch.setattr("dit_accel.kernels.mask.packed.SMALL_LISTS", 0)
    for blocks in ((64, 128), (128, 64)):
        other = PackedBlockMask.of(random_mask((1, 2), 500, 500, *blocks), False, backend="triton")
        assert other.lists().paired is None


@pytest.mark.parametrize("packed", [False, True], ids=["lists", "bits"])
def test_a_mask_that_serves_many_calls_is_paired_once(packed, monkeypatch):
    torch.manual_seed(1)
    mask = random_mask((1, 2), 500, 500, 64, 64)
    kept = PackedBlockMask.of(mask, False, backend="torch") if packed else mask.for_many_calls()
    of_a_call = (lambda: kept.lists()) if packed else (lambda: kept)
    first = query_pairs(of_a_call(), 64, "torch")
    assert query_pairs(of_a_call(), 64, "torch") is first
    assert torch.equal(first.header, query_pairs(replace(mask), 64, "torch").header)
    # Other halves of blocks, and lists that are not kept, are paired anew.
    assert query_pairs(of_a_call(), 32, "torch").block_k == 32
    monkeypatch.setattr("dit_accel.kernels.mask.packed.SMALL_LISTS", 0)
    passing = PackedBlockMask.of(mask, False, backend="torch").lists()
    for other in (passing, replace(mask)):
        assert query_pairs(other, 64, "torch") is not query_pairs(other, 64, "torch")


def test_a_graph_that_is_captured_leaves_no_pairs(monkeypatch):
    mask = random_mask((1, 2), 500, 500, 64, 64).for_many_calls()
    with monkeypatch.context() as patched:
        patched.setattr("dit_accel.kernels.mask.query_pairs.is_captured", lambda _device: True)
        query_pairs(mask, 64, "torch")
    assert mask.paired is None
    assert query_pairs(mask, 64, "torch") is mask.paired
