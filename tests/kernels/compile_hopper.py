"""Compile variants of the Hopper kernel without a GPU; print the PTX and shared memory of each as JSON.

    python -m tests.kernels.compile_hopper NAME ...

In a process of its own: the tests interpret Triton, and the driver that is set here stands in for a GPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention.hopper import forward as hopper_forward
from dit_accel.kernels.attention.means import BlockMeans, LeftOutMeans
from dit_accel.kernels.common.quantized_inputs import reference_quantize
from dit_accel.kernels.mask.packed import pack_bits
from dit_accel.kernels.mask.query_pairs import query_pairs

LENGTH, HEADS = 256, 2
WIDE = {"wide_steps": True, "stages": 4}
VARIANTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: (keys a block, head dim, settings)
    "half": (128, 128, {}),
    "half 64": (64, 128, {}),
    "half D=64": (128, 64, {"key_mask": True}),
    "wide D=64": (64, 64, {"changes": WIDE}),
    "wide rows D=64": (64, 64, {"rows": True, "key_mask": True, "changes": WIDE}),
    "wide bits D=64": (64, 64, {"key_mask": True, "bits": True, "changes": WIDE}),
    "rows": (128, 128, {"rows": True}),
    "rows 64": (64, 128, {"rows": True}),
    "rows D=64": (64, 64, {"rows": True, "key_mask": True}),
    "int8": (64, 128, {"precision": "int8"}),
    "int8 rows": (128, 128, {"precision": "int8", "rows": True}),
    "int8_fp8": (128, 128, {"precision": "int8_fp8"}),
    "pairs": (64, 128, {"queries": 64}),
    "pairs turns": (64, 128, {"queries": 64, "changes": {"take_turns": True}, "dtype": torch.float16}),
    "pairs 128": (128, 128, {"queries": 64, "key_mask": True}),
    "pairs D=64": (64, 64, {"queries": 64}),
    "pairs rows": (64, 128, {"queries": 64, "rows": True}),
    "pairs rows bits": (128, 128, {"queries": 64, "rows": True, "bits": True, "key_mask": True}),
    "pairs int8": (64, 128, {"queries": 64, "precision": "int8"}),
    "pairs int8 rows": (128, 128, {"queries": 64, "precision": "int8", "rows": True, "key_scales": "thread"}),
    "pairs int8 rows bits": (
        64,
        128,
        {"queries": 64, "precision": "int8", "rows": True, "bits": True, "key_mask": True, "key_scales": "thread"},
    ),
    "pairs int8 turns": (
        64,
        128,
        {"queries": 64, "precision": "int8", "changes": {"take_turns": True}, "key_scales": "thread"},
    ),
    "pairs int8 D=64": (64, 64, {"queries": 64, "precision": "int8", "key_mask": True}),
    "pairs int8_fp8": (64, 128, {"queries": 64, "precision": "int8_fp8"}),
    "pairs int8_fp8 rows bits": (
        128,
        128,
        {"queries": 64, "precision": "int8_fp8", "rows": True, "bits": True, "key_mask": True},
    ),
    "pairs int8_fp8 D=64": (64, 64, {"queries": 64, "precision": "int8_fp8", "rows": True}),
    "pairs rows D=64": (64, 64, {"queries": 64, "rows": True, "key_mask": True, "dtype": torch.float16}),
    # means: tokens of each
    "half means 64": (64, 128, {"means": 64}),
    "half means rows 64": (64, 128, {"rows": True, "means": 64}),
    "half means rows 64 of 16": (64, 128, {"rows": True, "means": 16, "dtype": torch.float16}),
    "pairs means": (64, 128, {"queries": 64, "means": 64}),
    "pairs means rows": (64, 128, {"queries": 64, "rows": True, "means": 64}),
    "pairs means 128 of 16": (128, 128, {"queries": 64, "means": 16, "dtype": torch.float16}),
    "pairs means rows D=64 of 16": (64, 64, {"queries": 64, "rows": True, "means": 16}),
    "pairs means turns": (64, 128, {"queries": 64, "means": 64, "changes": {"take_turns": True}}),
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
        self.ptx, self.shared = "", 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **settings)
            self.ptx, self.shared = compiled.asm["ptx"], compiled.metadata.shared

        return launch


def main() -> None:
    driver.set_active(StandIn())
    kernel = Compiles(hopper_forward.hopper_fwd_kernel)
    hopper_forward.hopper_fwd_kernel = kernel
    hopper_forward.multiprocessors = lambda index: 132
    # The lists are another kernel's.
    hopper_forward.query_pairs = lambda mask, block_k, backend: query_pairs(mask, block_k, "torch")
    for name in sys.argv[1:]:
        block_k, dim, settings = VARIANTS[name]
        block_q, dtype = settings.get("queries", 128), settings.get("dtype", torch.bfloat16)
        q, k, v = (torch.randn(1, LENGTH, HEADS, dim, dtype=dtype) for _ in range(3))
        keep = torch.ones(1, HEADS, LENGTH // block_q, LENGTH // block_k, dtype=torch.bool)
        bits: dict[str, torch.Tensor] = {}
        if settings.get("bits"):
            words = torch.ones(1, block_q, block_k // 32, dtype=torch.int32)
            bits = {"partial": keep, "bit_rows": keep.int() - 1, "token_bits": words}
        mask = BlockMask.from_dense(keep, block_q, block_k, LENGTH, LENGTH, **bits)
        rows = torch.arange(LENGTH, dtype=torch.int32).expand(1, HEADS, LENGTH) if settings.get("rows") else None
        hidden = torch.ones(1, LENGTH, dtype=torch.bool) if settings.get("key_mask") else None
        precision = settings.get("precision")
        options = {"precision": precision, "key_scales": settings.get("key_scales", "block")}
        ready = precision and reference_quantize(q, k, v, block_q, block_k, **options)
        config = None
        if "changes" in settings:
            config = hopper_forward.default_config(64, dim, precision, rows is not None, pairs=block_q == 64)
            config = replace(config, **settings["changes"])
        means = None
        if tokens := settings.get("means"):
            pooled = (torch.zeros(1, HEADS, LENGTH // tokens, dim, dtype=dtype) for _ in range(2))
            means = LeftOutMeans(BlockMeans(*pooled, tokens, block_k, LENGTH), pack_bits(keep))
        hopper_forward.hopper_forward(
            q, k, v, mask, rows, hidden, 0.1, quantized=ready or None, config=config, means=means
        )
        print(json.dumps({"name": name, "ptx": kernel.ptx, "shared": kernel.shared}), flush=True)


if __name__ == "__main__":
    main()
