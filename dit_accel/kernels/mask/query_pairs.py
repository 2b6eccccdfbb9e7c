"""Lists of two query blocks at a time: what both read comes first, so that a kernel can load it once for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common.capability import choose_selection
from ..common.choice import Case
from ..common.launch import is_captured
from .block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class QueryPairs:
    """The lists of a :class:`BlockMask`, of query blocks ``2 p`` and ``2 p + 1`` of each head side by side.

    A row starts with the full blocks that both rows of its pair list, in the same order. Its other full blocks follow,
    then its partial ones. A last block without a partner has one that reads nothing.

    Attributes:
        header: int32 ``[B, H, pairs, 5]``: entries of the first and of the second row, full ones of either, and
            how many entries they share.
        kv_indices: int32 ``[B, H, 2 * pairs, K]``, key blocks of ``block_k`` tokens.
        kv_bits, token_bits: as in the mask, by these rows and key blocks.
        block_k: tokens in a key block.
    """

    header: torch.Tensor
    kv_indices: torch.Tensor
    kv_bits: torch.Tensor | None
    token_bits: torch.Tensor | None
    block_k: int


def query_pairs(mask: BlockMask, block_k: int, backend: str = "auto") -> QueryPairs:
    """Pair the query blocks of a mask; in Triton in one launch, without a host sync. A mask that serves many calls
    keeps them.

    Args:
        block_k: tokens in a key block of the result, the mask's own number or a whole part of it. Where the last key
            block is short, some of its parts may lie behind the last key.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`.

    Raises:
        ValueError: ``block_k`` does not divide the mask's.
    """
    if mask.block_k % block_k:
        raise ValueError(f"block_k must divide the mask's {mask.block_k}, got {block_k}.")
    if mask.paired is not None and mask.paired.block_k == block_k:
        return mask.paired
    parts = mask.block_k // block_k
    bits = mask.token_bits
    if bits is not None and parts > 1:
        # A part of a block has a part of each word row.
        bits = bits.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    if choose_selection(Case(mask.kv_indices.device), backend).name == "triton":
        from .triton_lists import query_pairs_triton

        header, indices, bit_rows = query_pairs_triton(mask, parts)
    else:
        header, indices, bit_rows = _in_torch(mask, parts)
    pairs = QueryPairs(header, indices, bit_rows, bits, block_k)
    if mask.serves_many and not is_captured(header.device):  # what a CUDA graph makes is the graph's own
        object.__setattr__(mask, "paired", pairs)
    return pairs


def _in_torch(mask: BlockMask, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Header, lists and rows of bits, whose entries past a row's number are 0."""
    nk = mask.num_blocks[1]
    odd = mask.kv_num_blocks.shape[-1] % 2
    number, full = (F.pad(x, (0, odd)) for x in (mask.kv_num_blocks, mask.kv_num_full))
    index = F.pad(mask.kv_indices, (0, 0, 0, odd)).long()
    slot = torch.arange(index.shape[-1], device=index.device)
    is_full = slot < full[..., None]
    # A column more, for all that is not asked about.
    lists = torch.zeros(*index.shape[:-1], nk + 1, dtype=torch.bool, device=index.device)
    lists.scatter_(-1, torch.where(is_full, index, nk), True)
    partner = lists.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)
    shared = is_full & partner.gather(-1, torch.where(is_full, index, nk))
    # Shared ones and other full ones rise, as they do in every list that this package makes; partial ones stay.
    rank = torch.where(shared, index, nk + torch.where(is_full, index, nk + slot))
    order = rank.argsort(-1)
    listed = slot < number[..., None]
    count = shared.sum(-1, dtype=torch.int32)[..., ::2, None]
    header = torch.cat([number.unflatten(-1, (-1, 2)), full.unflatten(-1, (-1, 2)), count], -1) * parts
    part = torch.arange(parts, device=index.device)
    indices = (index.gather(-1, order)[..., None] * parts + part) * listed[..., None]
    bit_rows = None
    if mask.kv_bits is not None:
        own = F.pad(mask.kv_bits, (0, 0, 0, odd)).gather(-1, order)[..., None]
        bit_rows = torch.where(own < 0, -1, own * parts + part).flatten(-2).to(torch.int32)
        bit_rows = bit_rows * listed.repeat_interleave(parts, -1)
    return header.to(torch.int32), indices.flatten(-2).to(torch.int32), bit_rows
