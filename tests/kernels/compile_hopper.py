"""Compile variants of the Hopper kernel without a GPU; print the PTX of each as JSON.

    python -m tests.kernels.compile_hopper NAME ...

In a process of its own: the tests interpret Triton, and the driver that is set here stands in for a GPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention.hopper import forward as hopper_forward
from dit_accel.kernels.common.quantized_inputs import reference_quantize

LENGTH, HEADS = 256, 2
VARIANTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: (keys a block, head dim, settings)
    "half": (128, 128, {}),
    "half 64": (64, 128, {}),
    "half D=64": (128, 64, {"key_mask": True}),
    "rows": (128, 128, {"rows": True}),
    "rows 64": (64, 128, {"rows": True}),
    "rows D=64": (64, 64, {"rows": True, "key_mask": True}),
    "int8": (64, 128, {"precision": "int8"}),
    "int8 rows": (128, 128, {"precision": "int8", "rows": True}),
    "int8_fp8": (128, 128, {"precision": "int8_fp8"}),
}


class StandIn:
    """A driver of one H200 for Triton's compiler."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiles:
    """In the kernel's place: compiles a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.ptx = ""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> None:
            self.ptx = self.kernel.warmup(*args, grid=grid, **settings).asm["ptx"]

        return launch


def main() -> None:
    driver.set_active(StandIn())
    kernel = Compiles(hopper_forward.hopper_fwd_kernel)
    hopper_forward.hopper_fwd_kernel = kernel
    hopper_forward.multiprocessors = lambda index: 132
    for name in sys.argv[1:]:
        block_k, dim, settings = VARIANTS[name]
        q, k, v = (torch.randn(1, LENGTH, HEADS, dim, dtype=torch.bfloat16) for _ in range(3))
        keep = torch.ones(1, HEADS, LENGTH // 128, LENGTH // block_k, dtype=torch.bool)
        mask = BlockMask.from_dense(keep, 128, block_k, LENGTH, LENGTH)
        rows = torch.arange(LENGTH, dtype=torch.int32).expand(1, HEADS, LENGTH) if settings.get("rows") else None
        hidden = torch.ones(1, LENGTH, dtype=torch.bool) if settings.get("key_mask") else None
        precision = settings.get("precision")
        ready = precision and reference_quantize(q, k, v, 128, block_k, precision=precision)
        hopper_forward.hopper_forward(q, k, v, mask, rows, hidden, 0.1, quantized=ready or None)
        print(json.dumps({"name": name, "ptx": kernel.ptx}), flush=True)


if __name__ == "__main__":
    main()
