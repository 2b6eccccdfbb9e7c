"""Launch of a kernel's compiled variant without Triton's look at every argument.

For each launch Triton works out from all arguments which variant runs: two thirds of a launch's time on the host where
a kernel takes fifty (67 and 18 us, measured on the host of an H200). Where a few facts of the call decide, they are a
key under which the variant is kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

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
