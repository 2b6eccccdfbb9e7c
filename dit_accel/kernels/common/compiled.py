"""Launch of a kernel's compiled variant without Triton's look at every argument.

For each launch Triton works out from all arguments which variant runs: two thirds of a launch's time on the host where
a kernel takes fifty (67 and 18 us, measured on the host of an H200). Where a few facts of the call decide, they are a
key under which the variant is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

MOST_KEPT = 4096
"""Variants that a kernel keeps; where there are more, it begins anew."""


class CompiledVariants:
    """The compiled variants of one kernel, by what decides the variant."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        key: Hashable,
        args: Sequence[Any],
        constants: dict[str, Any],
        num_warps: int,
    ) -> None:
        """Launch ``kernel`` on the current device.

        Args:
            key: decides dtypes, alignments, the values that Triton specialises on, and the device.
            args, constants: in the order of the kernel's parameters.

        Raises:
            TypeError: the constants are not the kernel's last parameters in their order.
        """
        variant = self._kept.get(key)
        if variant is not None:
            variant[grid](*args, *constants.values())
            return
        variant = kernel[grid](*args, **constants, num_warps=num_warps)
        if not hasattr(variant, "packed_metadata"):  # the interpreter's, or a stand-in's that only compiles
            return
        names = kernel.arg_names[len(args) :]
        if names != list(constants):
            raise TypeError(f"The constants must be {', '.join(names)}, got {', '.join(constants)}.")
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[key] = variant


def _fact(x: Any) -> Hashable:
    return (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else x


class KeptKernel:
    """A kernel that is launched as Triton's own is, ``kernel[grid](*args, CONSTANT=..., num_warps=...)``.

    Constants and options go by name, all else by place. The key is made of all that Triton could look at: a tensor's
    dtype and whether it begins at 16 bytes, and of other arguments the values themselves. So two launches of one key
    are of one variant, whatever Triton specialises on; the price is a key for each length, of which few are in use.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[Hashable, tuple[Any, list[str]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if torch.compiler.is_compiling():  # a trace knows Triton's own kernels, and keeps them itself
            self.kernel[grid](*args, **named)
            return
        key = self.key(args, named)
        kept = self._kept.get(key)
        if kept is not None:
            variant, constants = kept
            variant[(*grid, 1, 1)[:3]](*args, *[named[name] for name in constants])
            return
        variant = self.kernel[grid](*args, **named)
        if not hasattr(variant, "packed_metadata"):  # the interpreter's, or a stand-in's that only compiles
            return
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[key] = variant, self.kernel.arg_names[len(args) :]

    @staticmethod
    def key(args: Sequence[Any], named: dict[str, Any]) -> Hashable:
        """What decides the variant: the device of the first argument, a tensor, and facts of each argument."""
        facts = [x if type(x) is int else _fact(x) for x in args]
        return (args[0].device, *facts, *named, *named.values())
