"""Tensors that are replaced for a while, and given back bit by bit."""

from __future__ import annotations

import torch


class KeptTensors:
    """The first values of parameters and buffers.

    They wait in the CPU's memory, so that a GPU holds the replacements alone. The objects stay the same, for
    optimizers, hooks and offloading know them by identity.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replace(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        """Put other data into a tensor. What it held before its first replacement is kept."""
        self._first.setdefault(id(tensor), (tensor, tensor.data.cpu()))
        tensor.data = data

    def give_back(self) -> None:
        """Put the first data back, on the device where each tensor is now."""
        for tensor, first in self._first.values():
            tensor.data = first.to(tensor.device)
        self._first.clear()
