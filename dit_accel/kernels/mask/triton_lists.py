"""Block lists in one launch, from the rank of every block or from bits; and bits from lists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.compiled import KeptKernel
from ..common.launch import power_of_two
from .block_mask import BlockMask


@triton.jit
def list_fwd_kernel(rank_ptr, indices_ptr, num_ptr, num_full_ptr, nk, WIDTH: tl.constexpr):
    """One row's lists from the rank of each block: 0 full, 1 partial, 2 not kept."""
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    rank = tl.load(rank_ptr + pid * nk + j, mask=j < nk, other=2).to(tl.int32)
    write_lists(rank, j, pid, indices_ptr + pid * nk, num_ptr, num_full_ptr)


@triton.jit
def unpack_fwd_kernel(
    kept_ptr, partial_ptr, indices_ptr, num_ptr, num_full_ptr, nk, num_bytes, longest, short, WIDTH: tl.constexpr
):
    """One row's lists from its bits; the key block ``short`` is partial where it is kept."""
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    rank = rank_of_bits(kept_ptr, partial_ptr, pid, j, j < nk, num_bytes, short)
    write_lists(rank, j, pid, indices_ptr + pid * longest, num_ptr, num_full_ptr)


@triton.jit
def rank_of_bits(kept_ptr, partial_ptr, row, j, there, num_bytes, short):
    """Rank of each block ``j`` of a row as in :func:`list_fwd_kernel`; 2 where it is not ``there``."""
    place = row * num_bytes + j // 8
    kept = (tl.load(kept_ptr + place, mask=there, other=0) >> (j % 8)) & 1
    partial = (j == short).to(tl.int32)
    if partial_ptr is not None:
        partial |= (tl.load(partial_ptr + place, mask=there, other=0) >> (j % 8)) & 1
    return tl.where(kept != 0, partial, 2)


@triton.jit
def unpack_pairs_fwd_kernel(
    kept_ptr, partial_ptr, indices_ptr, num_ptr, num_full_ptr, header_ptr, nq, nk, num_bytes, longest, short,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The lists of two rows from their bits, with what both read in full first."""
    pairs = (nq + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    row = pid // pairs * nq + pid % pairs * 2
    paired = pid % pairs * 2 + 1 < nq
    j = tl.arange(0, WIDTH)
    first = rank_of_bits(kept_ptr, partial_ptr, row, j, j < nk, num_bytes, short)
    second = rank_of_bits(kept_ptr, partial_ptr, row + 1, j, (j < nk) & paired, num_bytes, short)
    both = ((first == 0) & (second == 0)).to(tl.int32)
    header_ptr += pid * 5
    for half in tl.static_range(2):
        rank = second if half else first
        full, partial = (rank == 0).to(tl.int32), (rank == 1).to(tl.int32)
        num_full = tl.sum(full, 0)
        number = num_full + tl.sum(partial, 0)
        own = tl.sum(both, 0) + tl.cumsum(full - both, 0)
        place = tl.where(both != 0, tl.cumsum(both, 0), own) - 1
        place = tl.where(partial != 0, num_full + tl.cumsum(partial, 0) - 1, place)
        tl.store(indices_ptr + (pid * 2 + half) * longest + place, j, mask=rank < 2)
        there = paired if half else True
        tl.store(num_ptr + row + half, number, mask=there)
        tl.store(num_full_ptr + row + half, num_full, mask=there)
        tl.store(header_ptr + half, number)
        tl.store(header_ptr + 2 + half, num_full)
    tl.store(header_ptr + 4, tl.sum(both, 0))


@triton.jit
def write_lists(rank, j, pid, row_ptr, num_ptr, num_full_ptr):
    """Full blocks first, then partial ones, both rising."""
    before = tl.cumsum(tl.where(rank == 0, 1, tl.where(rank == 1, 65536, 0)), 0)
    num_full = tl.sum((rank == 0).to(tl.int32), 0)
    place = tl.where(rank == 0, (before & 65535) - 1, num_full + (before >> 16) - 1)
    tl.store(row_ptr + place, j, mask=rank < 2)
    tl.store(num_ptr + pid, tl.sum((rank < 2).to(tl.int32), 0))
    tl.store(num_full_ptr + pid, num_full)


@triton.jit
def pack_fwd_kernel(
    indices_ptr, num_ptr, num_full_ptr, kept_ptr, partial_ptr, length, num_bytes,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's bits from its lists."""
    pid = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ENTRIES)
    listed = slot < tl.load(num_ptr + pid)
    index = tl.load(indices_ptr + pid * length + slot, mask=listed, other=0)
    place = tl.arange(0, WIDTH // 8)
    at = pid * num_bytes + place
    tl.store(kept_ptr + at, bits_of(index, listed, WIDTH), mask=place < num_bytes)
    if partial_ptr is not None:
        hidden = listed & (slot >= tl.load(num_full_ptr + pid))
        tl.store(partial_ptr + at, bits_of(index, hidden, WIDTH), mask=place < num_bytes)


@triton.jit
def bits_of(index, listed, WIDTH: tl.constexpr):
    """uint8 ``[WIDTH / 8]`` of the entries that are ``listed``, each at most once."""
    bit = tl.histogram(index, WIDTH, mask=listed).reshape([WIDTH // 8, 8])
    return tl.sum(bit << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def pair_fwd_kernel(
    indices_ptr, num_ptr, num_full_ptr, bit_rows_ptr, header_ptr, paired_ptr, paired_bits_ptr, nq, length,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The lists of two rows with what both read in full first, each entry as ``PARTS`` smaller blocks."""
    pairs = (nq + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    row = pid // pairs * nq + pid % pairs * 2
    slot = tl.arange(0, ENTRIES)
    paired = pid % pairs * 2 + 1 < nq
    first, first_full, first_index = row_of_lists(row, True, indices_ptr, num_ptr, num_full_ptr, slot, length)
    second, second_full, second_index = row_of_lists(row + 1, paired, indices_ptr, num_ptr, num_full_ptr, slot, length)
    in_first = tl.histogram(first_index, WIDTH, mask=slot < first_full)
    in_second = tl.histogram(second_index, WIDTH, mask=slot < second_full)
    both = in_first * in_second
    first_at, second_at = pid * 2 * length, (pid * 2 + 1) * length
    write_paired(in_first, both, first_index, first, first_full, slot, paired_ptr, first_at, PARTS, WIDTH)
    write_paired(in_second, both, second_index, second, second_full, slot, paired_ptr, second_at, PARTS, WIDTH)
    if bit_rows_ptr is not None:
        write_bit_rows(bit_rows_ptr + row * length, first, first_full, slot, paired_bits_ptr, first_at, PARTS)
        write_bit_rows(bit_rows_ptr + (row + 1) * length, second, second_full, slot, paired_bits_ptr, second_at, PARTS)
    header_ptr += pid * 5
    tl.store(header_ptr, first * PARTS)
    tl.store(header_ptr + 1, second * PARTS)
    tl.store(header_ptr + 2, first_full * PARTS)
    tl.store(header_ptr + 3, second_full * PARTS)
    tl.store(header_ptr + 4, tl.sum(both, 0) * PARTS)


@triton.jit
def row_of_lists(row, there, indices_ptr, num_ptr, num_full_ptr, slot, length):
    """Number of entries of a row, of full ones, and the entries; nothing where the row is not ``there``."""
    number = tl.load(num_ptr + row, mask=there, other=0)
    num_full = tl.load(num_full_ptr + row, mask=there, other=0)
    return number, num_full, tl.load(indices_ptr + row * length + slot, mask=slot < number, other=0)


@triton.jit
def write_paired(
    full, both, index, number, num_full, slot, paired_ptr, at, PARTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Blocks that ``both`` rows read in full, other full ones, both rising; partial ones where they were."""
    place = tl.where(both != 0, tl.cumsum(both, 0), tl.sum(both, 0) + tl.cumsum(full - both, 0)) - 1
    for part in tl.static_range(PARTS):
        tl.store(paired_ptr + (at + place) * PARTS + part, tl.arange(0, WIDTH) * PARTS + part, mask=full != 0)
        partial = (slot >= num_full) & (slot < number)
        tl.store(paired_ptr + (at + slot) * PARTS + part, index * PARTS + part, mask=partial)


@triton.jit
def write_bit_rows(bit_rows_ptr, number, num_full, slot, paired_bits_ptr, at, PARTS: tl.constexpr):
    """Rows of bits of a row's partial blocks, by part."""
    partial = (slot >= num_full) & (slot < number)
    bit_row = tl.load(bit_rows_ptr + slot, mask=partial, other=-1)
    for part in tl.static_range(PARTS):
        own = tl.where(bit_row < 0, -1, bit_row * PARTS + part)
        tl.store(paired_bits_ptr + (at + slot) * PARTS + part, own, mask=partial)


@triton.jit
def cut_fwd_kernel(
    indices_ptr, num_ptr, num_full_ptr, bit_rows_ptr, cut_ptr, cut_num_ptr, cut_full_ptr, cut_bits_ptr, nq, first_q,
    rows, length, first, stop, width, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The entries of one row from key block ``first`` up to ``stop``, in the order that they have."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // rows * nq + first_q + pid % rows
    slot = tl.arange(0, ENTRIES)
    number, num_full, index = row_of_lists(row, True, indices_ptr, num_ptr, num_full_ptr, slot, length)
    taken = (slot < number) & (index >= first) & (index < stop)
    count = tl.sum(taken.to(tl.int32), 0)
    place = pid * width + tl.cumsum(taken.to(tl.int32), 0) - 1
    behind = (slot >= count) & (slot < width)
    tl.store(cut_ptr + place, index - first, mask=taken)
    tl.store(cut_ptr + pid * width + slot, 0, mask=behind)
    if bit_rows_ptr is not None:
        tl.store(cut_bits_ptr + place, tl.load(bit_rows_ptr + row * length + slot, mask=taken, other=-1), mask=taken)
        tl.store(cut_bits_ptr + pid * width + slot, -1, mask=behind)
    tl.store(cut_num_ptr + pid, count)
    tl.store(cut_full_ptr + pid, tl.sum((taken & (slot < num_full)).to(tl.int32), 0))


_LIST, _UNPACK, _UNPACK_PAIRS, _PACK, _PAIR, _CUT = (
    KeptKernel(kernel)
    for kernel in (
        list_fwd_kernel,
        unpack_fwd_kernel,
        unpack_pairs_fwd_kernel,
        pack_fwd_kernel,
        pair_fwd_kernel,
        cut_fwd_kernel,
    )
)


def bits_of_block_lists(mask: BlockMask, partial: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 bits ``[B, H, nq, ceil(nk / 8)]`` of the kept blocks, and if asked for of those that need masking."""
    number, number_full, indices = (x.contiguous() for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices))
    nk, length = mask.num_blocks[1], indices.shape[-1]
    kept = torch.empty(*number.shape, -(-nk // 8), dtype=torch.uint8, device=number.device)
    some = torch.empty_like(kept) if partial else None
    width = max(32, power_of_two(nk))
    with torch.cuda.device_of(number):
        _PACK[(number.numel(),)](
            indices, number, number_full, kept, some, length, kept.shape[-1],
            ENTRIES=max(32, power_of_two(length)), WIDTH=width, num_warps=row_warps(width, False),
        )  # fmt: skip
    return kept, some


def block_lists_triton(rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices, numbers and numbers of full blocks from int8 ranks ``[B, H, nq, nk]``; see :class:`BlockMask`.

    Entries past a row's number are 0.
    """
    rank = rank.contiguous()
    nk = rank.shape[-1]
    indices = torch.zeros(rank.shape, dtype=torch.int32, device=rank.device)
    number, number_full = torch.empty(2, *rank.shape[:-1], dtype=torch.int32, device=rank.device).unbind()
    width = max(32, power_of_two(nk))
    with torch.cuda.device_of(rank):
        _LIST[(number.numel(),)](rank, indices, number, number_full, nk, WIDTH=width, num_warps=row_warps(width, False))
    return indices, number, number_full


def block_lists_of_bits(
    kept: torch.Tensor, partial: torch.Tensor | None, nk: int, short: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of ``longest`` entries from uint8 bits ``[B, H, nq, ceil(nk / 8)]``; see :class:`PackedBlockMask`.

    Args:
        short: the last key block where it is short, -1 where it is not.
    """
    lead = kept.shape[:-1]
    indices = torch.zeros(*lead, longest, dtype=torch.int32, device=kept.device)
    number, number_full = torch.empty(2, *lead, dtype=torch.int32, device=kept.device).unbind()
    width = max(32, power_of_two(nk))
    with torch.cuda.device_of(kept):
        _UNPACK[(number.numel(),)](
            kept, partial, indices, number, number_full, nk, kept.shape[-1], longest, short,
            WIDTH=width, num_warps=row_warps(width, False),
        )  # fmt: skip
    return indices, number, number_full


def paired_lists_of_bits(
    kept: torch.Tensor, partial: torch.Tensor | None, nk: int, short: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`block_lists_of_bits` in the order of :class:`QueryPairs`, with a row for each head's last block's partner;
    and the header."""
    *lead, nq, num_bytes = kept.shape
    pairs = -(-nq // 2)
    indices = torch.zeros(*lead, 2 * pairs, longest, dtype=torch.int32, device=kept.device)
    number, number_full = torch.empty(2, *lead, nq, dtype=torch.int32, device=kept.device).unbind()
    header = torch.empty(*lead, pairs, 5, dtype=torch.int32, device=kept.device)
    width = max(32, power_of_two(nk))
    with torch.cuda.device_of(kept):
        _UNPACK_PAIRS[(header.numel() // 5,)](
            kept, partial, indices, number, number_full, header, nq, nk, num_bytes, longest, short,
            WIDTH=width, num_warps=row_warps(2 * width, False),
        )  # fmt: skip
    return indices, number, number_full, header


def query_pairs_triton(mask: BlockMask, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Header, lists and rows of bits of a mask whose key blocks fall into ``parts``; see :class:`QueryPairs`."""
    number, number_full, indices = (x.contiguous() for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices))
    nk, (nq, length) = mask.num_blocks[1], indices.shape[2:]
    pairs = -(-nq // 2)
    lead = indices.shape[:2]
    header = torch.empty(*lead, pairs, 5, dtype=torch.int32, device=indices.device)
    paired = torch.empty(*lead, 2 * pairs, length * parts, dtype=torch.int32, device=indices.device)
    bit_rows = None if mask.kv_bits is None else mask.kv_bits.contiguous()
    paired_bits = None if bit_rows is None else torch.empty_like(paired)
    width = max(32, power_of_two(nk))
    with torch.cuda.device_of(indices):
        _PAIR[(lead.numel() * pairs,)](
            indices, number, number_full, bit_rows, header, paired, paired_bits, nq, length,
            PARTS=parts, ENTRIES=max(32, power_of_two(length)), WIDTH=width, num_warps=row_warps(2 * width, False),
        )  # fmt: skip
    return header, paired, paired_bits


def cut_lists_triton(mask: BlockMask, queries: slice, keys: slice) -> BlockMask:
    """The mask of a run of query blocks and one of key blocks, in one launch; see :meth:`BlockMask.parts`.

    Entries past a row's number are 0.
    """
    number, number_full, indices = (x.contiguous() for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices))
    nq, length = indices.shape[2:]
    rows, width = queries.stop - queries.start, min(length, keys.stop - keys.start)
    lead = (*indices.shape[:2], rows)
    cut = torch.empty(*lead, width, dtype=torch.int32, device=indices.device)
    cut_number, cut_full = torch.empty(2, *lead, dtype=torch.int32, device=indices.device).unbind()
    bit_rows = None if mask.kv_bits is None else mask.kv_bits.contiguous()
    cut_bits = None if bit_rows is None else torch.empty_like(cut)
    entries = max(32, power_of_two(length))
    with torch.cuda.device_of(indices):
        _CUT[(cut_number.numel(),)](
            indices, number, number_full, bit_rows, cut, cut_number, cut_full, cut_bits, nq, queries.start, rows,
            length, keys.start, keys.stop, width, ENTRIES=entries, num_warps=row_warps(entries, False),
        )  # fmt: skip
    q_len = min(queries.stop * mask.block_q, mask.q_len) - queries.start * mask.block_q
    kv_len = min(keys.stop * mask.block_k, mask.kv_len) - keys.start * mask.block_k
    sizes = (mask.block_q, mask.block_k, q_len, kv_len)
    return BlockMask(cut_number, cut, cut_full, *sizes, cut_bits, mask.token_bits)


def row_warps(width: int, by_mass: bool) -> int:
    """Warps of a row's program: 16 entries a thread, and half as many with the 64-bit masses."""
    return max(1, min(16, width // (256 if by_mass else 512)))
