"""The lists of a BlockMask seen from the key blocks, which the backward of attention walks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class TransposedMask:
    """Query blocks that read each key block, ascending, full ones first (see BlockMask for the terms).

    Attributes:
        q_num_blocks, q_num_full: int32 ``[B, H, nk]``.
        q_indices: int32 ``[B, H, nk, nq]``.
        q_bits: optional int32 ``[B, H, nk, nq]``, rows of ``token_bits`` or -1.
    """

    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    q_num_full: torch.Tensor
    q_bits: torch.Tensor | None


def transpose_mask(mask: BlockMask) -> TransposedMask:
    """Transpose the lists on their device, without a host sync; linear in the number of block pairs."""
    nq, nk = mask.num_blocks
    slots = mask.kv_indices.shape[-1]
    lead = mask.kv_indices.shape[:2]
    device = mask.kv_indices.device
    slot = torch.arange(slots, device=device)
    listed = slot < mask.kv_num_blocks[..., None]
    # Unlisted entries are undefined; they go to an extra column, which is cut off.
    target = torch.where(listed, mask.kv_indices.long(), nk)
    kind = torch.where(slot < mask.kv_num_full[..., None], 1, 2).to(torch.int8)
    state = torch.zeros(*lead, nq, nk + 1, dtype=torch.int8, device=device).scatter_(-1, target, kind)
    state = state[..., :nk].transpose(-1, -2)
    full, partial = state == 1, state == 2
    num_full = full.sum(-1, dtype=torch.int32)
    rank = torch.where(
        full,
        full.cumsum(-1, dtype=torch.int32) - 1,
        num_full[..., None] + partial.cumsum(-1, dtype=torch.int32) - 1,
    )
    rank = torch.where(full | partial, rank, nq).long()
    ids = torch.arange(nq, device=device, dtype=torch.int32).expand(*lead, nk, nq)
    indices = torch.zeros(*lead, nk, nq + 1, dtype=torch.int32, device=device).scatter_(-1, rank, ids)
    bits = None
    if mask.kv_bits is not None:
        by_block = torch.full((*lead, nq, nk + 1), -1, dtype=torch.int32, device=device)
        by_block = by_block.scatter_(-1, target, mask.kv_bits)[..., :nk].transpose(-1, -2)
        bits = torch.full((*lead, nk, nq + 1), -1, dtype=torch.int32, device=device)
        bits = bits.scatter_(-1, rank, by_block.contiguous())[..., :nq].contiguous()
    return TransposedMask(
        q_num_blocks=num_full + partial.sum(-1, dtype=torch.int32),
        q_indices=indices[..., :nq].contiguous(),
        q_num_full=num_full,
        q_bits=bits,
    )
