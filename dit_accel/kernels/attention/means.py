"""Means of key blocks, which stand in for those that a query block leaves out: values that kernels are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class BlockMeans:
    """Mean keys and values of runs of slots: of whole key blocks, or of as many runs in each of them.

    Attributes:
        keys, values: ``[B, H, n, D]``, of any floating-point dtype; a run without visible tokens has any finite ones.
        tokens: slots in a run; the last one ends with the sequence.
        block_k: slots in a key block, a multiple of ``tokens``.
        kv_len: slots in all.
        visible: float32 ``[B|1, H|1, n]``, how many of a run's tokens a key mask shows; None where it shows all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: int
    block_k: int
    kv_len: int
    visible: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        """float32 ``[B|1, H|1, n]``: tokens that each mean stands for."""
        if self.visible is not None:
            return self.visible
        first = torch.arange(self.keys.shape[2], device=self.keys.device) * self.tokens
        return (self.kv_len - first).clamp(max=self.tokens).float()[None, None]


@dataclass(frozen=True, eq=False)
class LeftOutMeans:
    """Means of all key blocks, and of which of them a query block attends none, since it reads what they are of.

    Attributes:
        means: of all key blocks.
        kept: uint8 ``[B|1, H|1, nq, ceil(nk / 8)]``, the bits of a
            :class:`~dit_accel.kernels.mask.packed.PackedBlockMask`: key blocks that are read.
        backend: what :func:`~dit_accel.kernels.pyramid.means.choose_means` gave for the call.
    """

    means: BlockMeans
    kept: torch.Tensor
    backend: str = "auto"
