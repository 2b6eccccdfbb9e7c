"""Block masks that are kept between steps, a bit for each pair of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from ..common.capability import choose_selection, compute_capability, is_amd
from ..common.choice import Case
from ..common.launch import is_captured
from .block_mask import BlockMask
from .query_pairs import QueryPairs

# Bytes of a mask's lists that are kept beside its bits, with as many in pairs of rows where the kernel reads those. To
# unpack and pair them anew takes the host a third of a call, which counts where sequences are short and lists small: of
# 32,760 tokens in 64 x 64 blocks a head has 1 MB where a row reads everything, 0.2 MB where all read a fifth.
SMALL_LISTS = 1 << 21


@dataclass(frozen=True, eq=False)
class PackedBlockMask:
    """A :class:`BlockMask` without token bits in about a thirtieth of the memory at density 1, a tenth at 0.3.

    Attributes:
        kept: uint8 ``[B, H, nq, ceil(nk / 8)]``; bit ``j % 8`` of byte ``j // 8`` says whether key block ``j`` is
            read.
        partial: likewise, which of them need masking; None where only a short last block does.
        longest: entries in the longest row, 0-d on the CPU; there once ``arrived`` has happened. All that there could
            be where a CUDA graph packed the mask.
        arrived: None where the mask was packed on the CPU, in torch or by a graph.
        block_q, block_k, q_len, kv_len: as in the mask.
        backend: "triton" or "torch", which packed the mask and unpacks it.
        of_graph: packed while a CUDA graph was captured, whose replays write other bits: lists of it are never kept.
    """

    kept: torch.Tensor
    partial: torch.Tensor | None
    longest: torch.Tensor
    arrived: torch.cuda.Event | None
    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    backend: str = "torch"
    of_graph: bool = False
    _kept: BlockMask | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, mask: BlockMask, key_mask: bool, backend: str = "auto") -> PackedBlockMask:
        """Pack a mask; on a GPU without waiting for it.

        Args:
            key_mask: whether a key mask made blocks partial; without one only a short last block is.
            backend: one of :data:`~dit_accel.kernels.BACKENDS`.

        Raises:
            ValueError: the mask has token bits.
        """
        if mask.token_bits is not None:
            raise ValueError("A mask with token bits cannot be packed: a bit a block does not hold them.")
        backend = choose_selection(Case(mask.kv_indices.device), backend).name
        captured = is_captured(mask.kv_indices.device)
        if captured:
            longest = torch.tensor(mask.num_blocks[1], device="cpu")
        else:
            longest = mask.kv_num_blocks.max().to("cpu", non_blocking=True)
        arrived = None
        if backend == "triton":
            from .triton_lists import bits_of_block_lists

            kept, partial = bits_of_block_lists(mask, key_mask)
            if mask.kv_indices.is_cuda and not captured:
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(mask.kv_indices.device))
        else:
            keep = mask.to_dense()
            kept, partial = pack_bits(keep), None
            if key_mask:
                partial = pack_bits(keep & ~replace(mask, kv_num_blocks=mask.kv_num_full).to_dense())
        sizes = (mask.block_q, mask.block_k, mask.q_len, mask.kv_len)
        return cls(kept, partial, longest, arrived, *sizes, backend, captured)

    @cached_property
    def _width(self) -> int:
        """Entries of a row of the lists. Waited for once: a CUDA graph that is captured later must not wait."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return max(1, int(self.longest))

    @property
    def keeps_lists(self) -> bool:
        """Whether :meth:`lists` has unpacked them once and for all."""
        return self._kept is not None

    def lists(self) -> BlockMask:
        """The mask, its lists no longer than its longest row; in Triton in one launch, and small ones once and for all.

        Waits for the device to have packed it, the first time, and not for what came later.
        """
        if self._kept is not None:
            return self._kept
        mask = self._unpacked()
        # What a CUDA graph makes while it is captured is the graph's own.
        owned = self.of_graph or is_captured(mask.kv_indices.device)
        if mask.kv_indices.nbytes <= SMALL_LISTS and not owned:
            object.__setattr__(self, "_kept", mask.for_many_calls())
        return mask

    def _unpacked(self) -> BlockMask:
        nk = -(-self.kv_len // self.block_k)
        short = nk - 1 if self.kv_len % self.block_k else -1
        if self.backend == "triton":
            from .triton_lists import block_lists_of_bits, paired_lists_of_bits

            if self.block_q == self.block_k == 64 and reads_pairs(self.kept):
                paired, number, number_full, header = paired_lists_of_bits(
                    self.kept, self.partial, nk, short, self._width
                )
                indices = paired[:, :, : number.shape[2]]
                mask = BlockMask(number, indices, number_full, self.block_q, self.block_k, self.q_len, self.kv_len)
                object.__setattr__(mask, "paired", QueryPairs(header, paired, None, None, self.block_k))
                return mask
            indices, number, number_full = block_lists_of_bits(self.kept, self.partial, nk, short, self._width)
            return BlockMask(number, indices, number_full, self.block_q, self.block_k, self.q_len, self.kv_len)
        keep = unpack_bits(self.kept, nk)
        partial = None if self.partial is None else unpack_bits(self.partial, nk)
        sizes = (self.block_q, self.block_k, self.q_len, self.kv_len)
        return BlockMask.from_dense(keep, *sizes, partial=partial, backend="torch").trimmed()


def kept_bits(mask: BlockMask | PackedBlockMask, backend: str = "auto") -> torch.Tensor:
    """uint8 ``[B|1, H|1, nq, ceil(nk / 8)]``, :attr:`PackedBlockMask.kept` of a mask; in Triton a launch where it is in
    lists, whose token bits say nothing here."""
    if isinstance(mask, PackedBlockMask):
        return mask.kept
    if choose_selection(Case(mask.kv_indices.device), backend).name == "triton":
        from .triton_lists import bits_of_block_lists

        return bits_of_block_lists(mask, False)[0]
    return pack_bits(mask.to_dense())


def reads_pairs(x: torch.Tensor) -> bool:
    """Whether the kernel of a tensor's GPU reads the lists of 64-query blocks in pairs: Hopper's."""
    return x.is_cuda and not is_amd() and compute_capability(x.device.index or 0) == (9, 0)


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., ceil(n / 8)]`` from bool ``[..., n]``; the inverse of :func:`unpack_bits`."""
    padded = F.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    weights = (1 << torch.arange(8, device=keep.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[..., count]`` from uint8 ``[..., ceil(count / 8)]``."""
    shift = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shift) & 1).bool().flatten(-2)[..., :count]
