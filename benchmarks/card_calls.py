"""Compiles the portable kernels for one card, without a GPU; ``benchmarks/cards.py`` starts it, once for each share.

    python -m benchmarks.card_calls --card sm_89 --share 0/1 [--only CALL] [--holds TEXT]

One line of JSON a compiled kernel: what the assembler says of registers, spills and shared memory, and which matrix
instructions the kernel has. A launch whose configuration was seen is compiled once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# First, since it says how Triton is imported.
from .ptx_calls import (
    BATCH,
    HEADS,
    each_launch,
    linear_calls,
    means_calls,
    permutation,
    pyramid_calls,
    rotary_calls,
    selection_calls,
    stand_in,
    tensors,
)

import torch  # isort: skip
from triton import knobs  # isort: skip
from triton.backends.nvidia.compiler import CUDABackend  # isort: skip

from .card_list import Card, card  # isort: skip

DIMS = (64, 72, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64), (32, 32), (16, 16))
LENGTH = 256
SIZES_OF_TILES = ("BLOCK_Q", "BLOCK_K", "TILE_Q", "TILE_K", "BLOCK_D")
Call = Callable[[], Any]


def assembler_logs() -> dict[str, str]:
    """What Triton's own call of the assembler says from now on, by PTX."""
    logs: dict[str, str] = {}
    knobs.nvidia.dump_ptxas_log = True
    assemble = CUDABackend.make_cubin

    def logged(self: Any, ptx: str, *rest: Any) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin: bytes = assemble(self, ptx, *rest)
        logs[ptx] = log.getvalue()
        return cubin

    CUDABackend.make_cubin = logged
    return logs


def nvidia_facts(ptx: str, log: str) -> dict[str, Any]:
    """Registers a thread, bytes spilled, and the names of matrix instructions."""
    names = re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)(?=\.)[\w.:]*", ptx)
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        "products": sorted({product(name) for name in names}),
    }


def product(name: str) -> str:
    """A matrix instruction without shapes and layouts, such as ``mma.sync bf16``; sums are in float32 unless told."""
    unit = next(unit for unit in ("wgmma", "tcgen05.mma", "mma.sync") if name.startswith(unit))
    kinds = re.findall(r"\.(?:kind::)?(bf16|f16|tf32|s8|i8|e4m3|f8f6f4)(?=\.|$)", name)
    if not kinds:
        return unit
    return f"{unit} {kinds[0]} in f16" if name.endswith(".f16.f16.f16.f16") else f"{unit} {kinds[0]}"


def amd_facts(assembly: str) -> dict[str, Any]:
    """The same of AMD's assembly, whose registers are vectors of a wave."""

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    return {
        "registers": field("vgpr_count"),
        # Four bytes a register and lane.
        "spills": 4 * field("vgpr_spill_count"),
        "products": sorted(set(re.findall(r"\b(v_mfma|v_wmma)_", assembly))),
    }


def facts(kernel: Any, logs: dict[str, str]) -> dict[str, Any]:
    """Of a compiled kernel."""
    assembly = kernel.asm
    if "amdgcn" in assembly:
        found = amd_facts(assembly["amdgcn"])
    else:
        found = nvidia_facts(assembly["ptx"], logs[assembly["ptx"]])
    metadata, names = kernel.metadata, kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
    return {
        **found,
        "tiles": {name: constants[name] for name in SIZES_OF_TILES if name in constants},
        "shared": metadata.shared,
        "tensor_columns": getattr(metadata, "tmem_size", None) or 0,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
    }


def attention_cases() -> Iterator[tuple[str, Call]]:
    """Forward and backward of the portable kernel, whatever other kernel the card has."""
    from dit_accel.kernels import BlockMask
    from dit_accel.kernels.attention.triton.backward import backward
    from dit_accel.kernels.attention.triton.forward import forward

    def call(op: str, dim: int, dtype: torch.dtype, blocks: tuple[int, int], permuted: bool) -> None:
        q, k, v, grad = tensors(4, LENGTH, dim, dtype)
        keep = torch.ones(1, HEADS, *(LENGTH // n for n in blocks), dtype=torch.bool)
        mask = BlockMask.from_dense(keep, *blocks, LENGTH, LENGTH, backend="torch")
        rows = permutation(LENGTH) if permuted else None
        if op == "forward":
            forward(q, k, v, mask, rows, None, 0.1)
            return
        lse = torch.zeros(BATCH, HEADS, LENGTH)
        backward(q, k, v, mask, rows, None, 0.1, q, lse, grad, None)

    for arguments in itertools.product(("forward", "backward"), DIMS, DTYPES, BLOCKS, (False, True)):
        yield attention_name(*arguments), lambda arguments=arguments: call(*arguments)


def attention_name(op: str, dim: int, dtype: torch.dtype, blocks: tuple[int, int], permuted: bool) -> str:
    """Such as ``forward 128 bfloat16 128x64 permuted``."""
    order = "permuted" if permuted else "in order"
    return f"{op} {dim} {str(dtype).removeprefix('torch.')} {blocks[0]}x{blocks[1]} {order}"


def quantized_cases(fp8: bool) -> Iterator[tuple[str, Call]]:
    """The portable kernel of 8 bits, and what makes its inputs."""
    from dit_accel.kernels import BlockMask, quantize_inputs
    from dit_accel.kernels.quantized.triton.forward import quantized_forward

    def call(
        precision: str, dim: int, dtype: torch.dtype, blocks: tuple[int, int], permuted: bool, rotate: bool = False
    ) -> None:
        q, k, v = tensors(3, LENGTH, dim, dtype)
        keep = torch.ones(1, HEADS, *(LENGTH // n for n in blocks), dtype=torch.bool)
        mask = BlockMask.from_dense(keep, *blocks, LENGTH, LENGTH, backend="torch")
        rows = permutation(LENGTH) if permuted else None
        ready = quantize_inputs(q, k, v, *blocks, precision=precision, rows=rows, rotate=rotate, backend="triton")
        quantized_forward(ready, mask, rows, None, 0.1, HEADS, dtype)

    precisions = ("int8", "int8_fp8") if fp8 else ("int8",)
    blocks = [pair for pair in BLOCKS if min(pair) >= 32]
    for arguments in itertools.product(precisions, DIMS, DTYPES[:2], blocks, (False, True)):
        yield attention_name(*arguments), lambda arguments=arguments: call(*arguments)
    for arguments in itertools.product(("int8",), (64, 128), DTYPES[:2], blocks, (False, True)):
        yield f"{attention_name(*arguments)} rotated", lambda arguments=arguments: call(*arguments, rotate=True)


def cases(on: Card) -> dict[str, Call]:
    """Every call by name, those of selection with a name of its own."""
    half = tuple((dim, torch.bfloat16) for dim in DIMS)
    full = ((64, torch.float32),)
    fp8 = not isinstance(on.target, str) and on.target >= 89
    return {
        **dict(attention_cases()),
        **dict(quantized_cases(fp8)),
        **dict(selection_calls(half + full)),
        # Wider heads have no kernel, and in float32 none that is chosen by itself.
        **dict(linear_calls(half[:-1] + full)),
        **dict(pyramid_calls(half + full)),
        **dict(means_calls(half + full)),
        **dict(rotary_calls(half + full)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", required=True, help="such as sm_89 or gfx942")
    parser.add_argument("--share", default="0/1", help="which of how many shares of the calls")
    parser.add_argument("--only", action="append", default=[], help="a call's whole name; more than once for several")
    parser.add_argument("--holds", default="", help="what a call's name must hold")
    parser.add_argument("--pretend-kib", type=int, help="what launchers are told of the card's shared memory")
    asked = parser.parse_args()
    share, shares = map(int, asked.share.split("/"))
    on = card(asked.card)
    stand_in(on.target, (asked.pretend_kib or on.shared_kib) << 10)
    logs = assembler_logs()
    seen: set[int] = set()
    running = ""

    def told(kernel: str, compiled: Any) -> None:
        if id(compiled) not in seen:
            seen.add(id(compiled))
            row = {"card": on.name, "call": running, "kernel": kernel, **facts(compiled, logs)}
            print(json.dumps(row), flush=True)

    each_launch(told)
    torch.manual_seed(0)
    known = cases(on)
    unknown = set(asked.only) - set(known)
    if unknown:
        parser.error(f"no call has the name {', '.join(sorted(unknown))}.")
    wanted = [name for name in asked.only or known if asked.holds in name]
    for running in wanted[share::shares]:
        try:
            known[running]()
        except Exception as error:  # that one does not compile must not hide what others do
            lines = str(error).strip().splitlines() or [""]
            print(json.dumps({"card": on.name, "call": running, "error": f"{type(error).__name__}: {lines[-1]}"}))


if __name__ == "__main__":
    main()
