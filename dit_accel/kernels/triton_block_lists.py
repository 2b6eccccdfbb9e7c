"""Block lists from ranks in one launch, for masks that are given as blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def list_fwd_kernel(rank_ptr, indices_ptr, num_ptr, num_full_ptr, nk, WIDTH: tl.constexpr):
    """One row's lists from the rank of each block: 0 full, 1 partial, 2 not kept."""
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    rank = tl.load(rank_ptr + pid * nk + j, mask=j < nk, other=2).to(tl.int32)
    before = tl.cumsum(tl.where(rank == 0, 1, tl.where(rank == 1, 65536, 0)), 0)
    num_full = tl.sum((rank == 0).to(tl.int32), 0)
    place = tl.where(rank == 0, (before & 65535) - 1, num_full + (before >> 16) - 1)
    tl.store(indices_ptr + pid * nk + place, j, mask=rank < 2)
    tl.store(num_ptr + pid, tl.sum((rank < 2).to(tl.int32), 0))
    tl.store(num_full_ptr + pid, num_full)


def block_lists_triton(rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices, numbers and numbers of full blocks from int8 ranks ``[B, H, nq, nk]``; see :class:`BlockMask`.

    Entries past a row's number are 0.
    """
    rank = rank.contiguous()
    nk = rank.shape[-1]
    indices = torch.zeros(rank.shape, dtype=torch.int32, device=rank.device)
    counts = torch.empty(2, *rank.shape[:-1], dtype=torch.int32, device=rank.device)
    width = max(32, triton.next_power_of_2(nk))
    with torch.cuda.device_of(rank):
        list_fwd_kernel[(counts[0].numel(),)](
            rank, indices, counts[0], counts[1], nk, WIDTH=width, num_warps=row_warps(width, False)
        )
    return indices, counts[0], counts[1]


def row_warps(width: int, by_mass: bool) -> int:
    """Warps of a row's program: 16 entries a thread, and half as many with the 64-bit masses."""
    return max(1, min(16, width // (256 if by_mass else 512)))
