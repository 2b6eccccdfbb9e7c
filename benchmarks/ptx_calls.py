"""Compiles what calls of the package launch, without a GPU; ``benchmarks/ptx.py`` starts it, once for each share.

    python benchmarks/ptx_calls.py --target 90 --share 0/2 [--only TEXT]

It uses public names alone, so that it can compile another commit's package, which PYTHONPATH names. A kernel is named
by its call and its number among the call's launches: names of kernels may change. One line of JSON a launch, with its
PTX.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

# No line numbers in the PTX; asked before Triton is imported.
os.environ |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HALF, FULL = torch.bfloat16, torch.float32
BATCH, HEADS = 2, 3
Call = Callable[[], Any]
Sizes = tuple[tuple[int, torch.dtype], ...]


class StandIn:
    """A driver of one GPU for Triton's compiler; ``target`` is 90 for compute capability 9.0, or a name of AMD's."""

    def __init__(self, target: int | str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.target, str):
            return GPUTarget("hip", self.target, 64 if self.target.startswith("gfx9") else 32)
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class StandInEvent:
    """An event of a GPU that is not there."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def parameters(source: Any) -> str:
    """Types of a kernel's run-time parameters, and what the compiler was told of each."""
    told = [
        (kind, source.attrs.get((place,), []))
        for place, kind in enumerate(source.signature.values())
        if kind != "constexpr"
    ]
    return "\n".join(f"// parameter {number}: {kind} {attrs}" for number, (kind, attrs) in enumerate(told))


def each_launch(told: Callable[[str, Any], object]) -> None:
    """From now on compile every kernel in place of running it, and tell its name and what it compiled to."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **settings: Any) -> None:
        kernel = run(self, *args, **settings | {"warmup": True})
        told(self.fn.__name__, kernel)
        # Nothing to keep and launch the next time.

    JITFunction.run = compiled


def launches() -> list[tuple[str, str, str]]:
    """A list that every launch from now on is added to, as name, PTX and parameters, in place of running it."""
    found: list[tuple[str, str, str]] = []
    each_launch(lambda name, kernel: found.append((name, kernel.asm["ptx"], parameters(kernel.src))))
    # What follows the PTX takes most of the time.
    CUDABackend.make_cubin = lambda *_: b""
    return found


def stand_in(target: int | str, shared_bytes: int = 227 << 10) -> None:
    """Let tensors of the CPU pass for tensors of a GPU of compute capability ``target``, such as 90.

    ``target`` may also be a name of AMD's, such as gfx942. A program of this GPU may have ``shared_bytes`` of shared
    memory.
    """
    from dit_accel.kernels.common import capability

    driver.set_active(StandIn(target))
    found = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_block_optin=shared_bytes,
        shared_memory_per_block=shared_bytes,
        warp_size=StandIn(target).get_current_target().warp_size,
    )
    # AMD's gfx942 says 9.4, and gfx1100 11.0.
    number = int(target.removeprefix("gfx")[:-1]) if isinstance(target, str) else target
    torch.cuda.get_device_capability = lambda *_: (number // 10, number % 10)
    if isinstance(target, str):
        torch.version.hip = "stand-in"
    torch.cuda.get_device_properties = lambda *_: found
    torch.cuda.get_device_name = lambda *_: "stand-in"
    torch.cuda.current_stream = lambda *_: None
    torch.cuda.Event = StandInEvent  # type: ignore[misc]
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    # What a device of type "cpu" is asked for.
    capability.interpreted = lambda: True


def tensors(number: int, length: int, dim: int, dtype: torch.dtype, heads: int = HEADS) -> list[torch.Tensor]:
    """So many random ``[B, S, H, D]``."""
    return [torch.randn(BATCH, length, heads, dim).to(dtype) for _ in range(number)]


def permutation(length: int) -> torch.Tensor:
    """int32 ``[1, H, S]``."""
    return torch.stack([torch.randperm(length) for _ in range(HEADS)])[None].int()


def key_mask(length: int) -> torch.Tensor:
    """bool ``[B, S]`` that hides the last quarter."""
    return (torch.arange(length) < length * 3 // 4).expand(BATCH, length)


def attention_calls(target: int) -> Iterator[tuple[str, Call]]:
    from dit_accel.kernels import BlockMask, block_sparse_attention, quantize_inputs, quantized_block_sparse_attention

    def mask_of(length: int, blocks: tuple[int, int], bits: bool) -> BlockMask:
        counts = [-(-length // block) for block in blocks]
        keep = torch.ones(1, HEADS, *counts, dtype=torch.bool)
        masked: dict[str, torch.Tensor] = {}
        if bits:
            masked["bit_rows"] = torch.zeros(keep.shape, dtype=torch.int32)
            masked["token_bits"] = torch.ones(1, blocks[0], blocks[1] // 32, dtype=torch.int32)
        return BlockMask.from_dense(keep, *blocks, length, length, backend="torch", **masked)

    def call(length: int, blocks: tuple[int, int], dim: int, dtype: torch.dtype, extras: str, backward: bool) -> None:
        q, k, v = (x.requires_grad_(backward) for x in tensors(3, length, dim, dtype))
        out = block_sparse_attention(
            q,
            k,
            v,
            mask_of(length, blocks, "bits" in extras),
            rows=permutation(length) if "rows" in extras else None,
            key_mask=key_mask(length) if "hidden" in extras else None,
            backend="triton",
        )
        if backward:
            out.sum().backward()

    def quantized(blocks: tuple[int, int], dim: int, precision: str, extras: str) -> None:
        q, k, v = tensors(3, 256, dim, HALF)
        rows = permutation(256) if "rows" in extras else None
        settings = {
            "precision": precision,
            "rows": rows,
            "smooth_q": "smooth_q" in extras,
            "key_scales": "thread" if "thread" in extras else "block",
            "backend": "triton",
        }
        ready = quantize_inputs(q, k, v, *blocks, **settings)
        hidden = key_mask(256) if "hidden" in extras else None
        mask = mask_of(256, blocks, False)
        quantized_block_sparse_attention(q, k, v, mask, key_mask=hidden, quantized=ready, **settings)

    settings: list[tuple[tuple[int, int], int, torch.dtype, str]]
    if target == 90:
        # The Hopper kernel's; the backward of permuted calls is the portable one.
        settings = [(blocks, dim, HALF, extras) for blocks, dim, extras in (
            ((128, 128), 128, ""), ((128, 64), 128, ""), ((128, 128), 64, "hidden"), ((128, 128), 128, "rows"),
            ((128, 64), 128, "rows"), ((128, 64), 64, "rows hidden"), ((128, 64), 128, "bits"),
            ((128, 128), 128, "rows bits hidden"),
        )]  # fmt: skip
        settings += [((64, 64), 128, HALF, ""), ((128, 64), 96, HALF, "rows")]
    else:
        settings = [
            ((128, 128), 128, HALF, ""), ((128, 64), 64, HALF, "rows"), ((64, 64), 96, HALF, "hidden"),
            ((64, 64), 64, FULL, "rows bits hidden"), ((32, 32), 128, HALF, "bits"), ((16, 16), 64, HALF, ""),
        ]  # fmt: skip
    for blocks, dim, dtype, extras in settings:
        for length in (256, 203) if not extras else (256,):
            for backward in (False, True) if target == 80 or "rows" in extras else (False,):
                name = f"attention{' backward' if backward else ''} {length} {blocks[0]}x{blocks[1]} {dim} {dtype}"
                arguments = (length, blocks, dim, dtype, extras, backward)
                yield f"{name} {extras}".strip(), lambda arguments=arguments: call(*arguments)
    eights: list[tuple[tuple[int, int], int, str, str]] = [
        ((128, 64), 128, "int8", ""), ((128, 128), 128, "int8", "rows hidden"), ((128, 64), 64, "int8", "thread"),
        ((64, 64), 96, "int8", "rows smooth_q"),
    ]  # fmt: skip
    if target == 90:
        eights += [
            ((128, 128), 128, "int8_fp8", ""), ((128, 64), 128, "int8_fp8", "rows thread"),
            ((64, 64), 128, "int8_fp8", "rows hidden"),
        ]  # fmt: skip
    if target == 90:
        from dit_accel.kernels.mask.packed import PackedBlockMask

        yield "unpack pairs", lambda: PackedBlockMask.of(mask_of(256, (64, 64), False), True, "triton").lists()
    for eight in eights:
        yield " ".join(map(str, ("quantized", *eight))).strip(), lambda eight=eight: quantized(*eight)


def selection_calls(dims: Sizes = ((64, HALF), (96, FULL), (128, HALF))) -> Iterator[tuple[str, Call]]:
    from dit_accel.kernels import (
        BlockMask,
        add_pooled_compensation,
        pool_blocks,
        pooled_scores,
        select_blocks,
    )
    from dit_accel.kernels.mask.packed import PackedBlockMask
    from dit_accel.kernels.selection.api import self_similarity
    from dit_accel.kernels.selection.block_mass import block_mass
    from dit_accel.kernels.selection.gate import select_by_threshold
    from dit_accel.kernels.selection.rectified import pool_deviation

    backend = {"backend": "triton"}
    for dim, dtype in dims:
        for extras in ("", "rows", "rows hidden"):
            q, k = tensors(2, 300, dim, dtype)
            here = {"rows": permutation(300) if "rows" in extras else None}
            here |= {"key_mask": key_mask(300) if "hidden" in extras else None, **backend}
            name = f"{dim} {dtype} {extras}".strip()
            yield f"pool {name}", lambda q=q, here=here: pool_blocks(q, 64, **here)
            yield f"pooled scores {name}", lambda q=q, k=k, here=here: pooled_scores(q, k, 128, 64, **here)
            centre = torch.randn(BATCH, HEADS, dim)
            yield (
                f"self similarity {name}",
                lambda q=q, here=here, centre=centre: self_similarity(
                    q, 64, centre=centre if here["rows"] is None else None, **here
                ),
            )
            mean = torch.randn(BATCH, HEADS, 5, dim)
            yield f"deviation {name}", lambda q=q, mean=mean, here=here: pool_deviation(q, mean, 64, **here)
            for blocks in ((128, 64), (64, 32), (256, 128)):
                yield (
                    f"block mass {blocks[0]}x{blocks[1]} {name}",
                    lambda q=q, k=k, blocks=blocks, here=here: block_mass(
                        q, k, block_q=blocks[0], block_k=blocks[1], **here
                    ),
                )
    scores = torch.randn(BATCH, HEADS, 20, 40)
    sizes = {"block_q": 128, "block_k": 64, "q_len": 20 * 128 - 5, "kv_len": 40 * 64 - 5, **backend}
    forced = torch.arange(40) > 37
    for name, asked in {
        "density": {"density": 0.2},
        "top-p": {"top_p": 0.9, "forced_k": forced, "forced_q": torch.arange(20) > 18},
        "both": {"density": torch.full((1, HEADS), 0.2), "top_p": torch.full((1, HEADS), 0.9), "partial_k": forced},
    }.items():
        yield f"select {name}", lambda asked=asked: select_blocks(scores, **sizes, **asked)
    gates = torch.randn(BATCH, HEADS, 20, 40)
    for open_k in (None, forced):
        yield (
            f"gate {open_k is not None}",
            lambda open_k=open_k: select_by_threshold(
                gates, 0.3, block_q=128, block_k=64, seq_len=2555,
                open_k=None if open_k is None else open_k.expand(1, 1, 40), **backend,
            ),
        )  # fmt: skip
    keep = torch.rand(BATCH, HEADS, 20, 40) < 0.3
    lists = (keep, 128, 64, 2555, 2555)
    yield "lists", lambda: BlockMask.from_dense(*lists, **backend)
    mask = BlockMask.from_dense(*lists, backend="torch")
    yield "pack", lambda: PackedBlockMask.of(mask, True, **backend).lists()
    yield "pack short", lambda: PackedBlockMask.of(mask, False, **backend).lists()
    yield "cut", lambda: mask.parts(slice(0, 10), [slice(0, 20), slice(20, 40)], "triton")
    out, v = tensors(2, 2555, 128, HALF)
    prob = torch.rand(BATCH, HEADS, 20, 40)
    for rows in (None, permutation(2555)):
        yield (
            f"compensation {rows is not None}",
            lambda rows=rows: add_pooled_compensation(out, v, prob, mask, rows=rows, **backend),
        )


def linear_calls(dims: Sizes = ((64, HALF), (128, HALF), (48, FULL))) -> Iterator[tuple[str, Call]]:
    from dit_accel.kernels import BlockMask, add_linear_branch, plus_linear_branch
    from dit_accel.kernels.linear.api import linear_branch

    length = 300
    keep = torch.rand(BATCH, HEADS, 3, 5) < 0.3
    blocks = BlockMask.from_dense(keep, 128, 64, length, length, backend="torch")

    def call(form: str, dim: int, dtype: torch.dtype, kind: str, extras: str) -> None:
        out, q, k, v = tensors(4, length, dim, dtype)
        critical = None if "all" in extras else blocks
        settings: dict[str, Any] = {"feature_map": kind, "eps": 1e-5, "backend": "triton"}
        settings["rows"] = permutation(length) if "rows" in extras else None
        settings["key_mask"] = key_mask(length) if "hidden" in extras else None
        if "negligible" in extras:
            settings["negligible"] = blocks
        weight, bias = torch.randn(HEADS, dim, dim).requires_grad_(), torch.randn(HEADS, dim).requires_grad_()
        if form == "inference":
            add_linear_branch(out, q, k, v, critical, weight, bias, **settings)
            return
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        if form == "training":
            made = plus_linear_branch(out, q, k, v, critical, weight, bias, **settings)
        else:
            made = linear_branch(q, k, v, critical, **settings)
        made.sum().backward()

    forms = (("softmax", ""), ("softmax", "all hidden"), ("elu", "rows hidden"), ("relu", "negligible"))
    for dim, dtype in dims:
        for kind, extras in forms:
            for form in ("branch", "inference", "training"):
                arguments = (form, dim, dtype, kind, extras)
                yield f"linear {' '.join(map(str, arguments))}".strip(), lambda arguments=arguments: call(*arguments)


def pyramid_calls(dims: Sizes = ((128, HALF), (64, HALF), (48, FULL))) -> Iterator[tuple[str, Call]]:
    from dit_accel.kernels import pyramid_attention
    from dit_accel.kernels.pyramid.levels import similarity_cap

    def call(dim: int, dtype: torch.dtype, block_q: int, extras: str) -> None:
        q, k, v = (x.requires_grad_() for x in tensors(3, 300, dim, dtype))
        levels = torch.tensor([0, 1, 2, 4, 8], dtype=torch.int8).expand(BATCH, HEADS, -(-300 // block_q), 5)
        rows = permutation(300) if "rows" in extras else None
        hidden = key_mask(300) if "hidden" in extras else None
        out = pyramid_attention(
            q, k, v, levels, block_q=block_q, block_k=64, rows=rows, key_mask=hidden, backend="triton"
        )
        out.sum().backward()

    for dim, dtype in dims:
        arguments = (
            (dim, dtype, 128, "") if dim >= 128 else (dim, dtype, 64, "rows" if dtype == FULL else "rows hidden")
        )
        yield f"pyramid {' '.join(map(str, arguments))}".strip(), lambda arguments=arguments: call(*arguments)
    (k,) = tensors(1, 300, 128, HALF)
    for rows in (None, permutation(300)):
        yield f"similarity cap {rows is not None}", lambda rows=rows: similarity_cap(k, 64, rows=rows, backend="triton")


def means_calls(dims: Sizes = ((128, HALF), (64, HALF), (48, FULL))) -> Iterator[tuple[str, Call]]:
    """Attention that goes on over the means of what it left out."""
    from dit_accel.kernels.pyramid.means import BlockMeans, add_left_out_means

    def call(dim: int, dtype: torch.dtype, block_q: int, extras: str) -> None:
        out, q = tensors(2, 300, dim, dtype)
        keys, values = torch.empty(2, BATCH, HEADS, 5, dim)
        visible = torch.ones(BATCH, 1, 5) if "hidden" in extras else None
        means = BlockMeans(keys, values, 64, 64, 300, visible)
        kept = torch.zeros(BATCH, HEADS, -(-300 // block_q), 1, dtype=torch.uint8)
        rows = permutation(300) if "rows" in extras else None
        lse = torch.zeros(BATCH, HEADS, 300)
        add_left_out_means(out, lse, q, means, kept, block_q=block_q, rows=rows, scale=0.1, backend="triton")

    for dim, dtype in dims:
        for arguments in ((dim, dtype, 128, "rows"), (dim, dtype, 64, "rows hidden"), (dim, dtype, 64, "")):
            yield f"means {' '.join(map(str, arguments))}".strip(), lambda arguments=arguments: call(*arguments)


def merge_calls(dims: Sizes = ((64, HALF), (96, FULL), (128, HALF))) -> Iterator[tuple[str, Call]]:
    """Attention to parts of the keys put together, of every head dim."""
    from dit_accel.kernels.attention.merge import merge_attention

    # The last of two parts, the first of several, one between, and the last of those.
    for dim, dtype in dims:
        for held, into in ((dtype, dtype), (dtype, None), (FULL, None), (FULL, dtype)):
            out, part = (tensors(1, 300, dim, kind)[0] for kind in (held, dtype))
            lse = torch.zeros(BATCH, HEADS, 300)
            yield (
                f"merge {dim} {dtype} {held} to {into}",
                lambda out=out, part=part, lse=lse, into=into: merge_attention(
                    out, lse, part, lse.clone(), into, "triton"
                ),
            )


def rotary_calls(dims: Sizes = ((64, HALF), (96, FULL), (128, HALF))) -> Iterator[tuple[str, Call]]:
    """Rotary embedding of queries and keys."""
    from dit_accel.kernels.rotary.triton import rotate_pairs_triton

    for dim, dtype in dims:
        q, k = tensors(2, 300, dim, dtype)
        angles = [torch.zeros(1, 300, 1, dim) for _ in range(2)]
        yield f"rotary {dim} {dtype}", lambda q=q, k=k, angles=angles: rotate_pairs_triton(q, k, *angles)


def calls(target: int) -> dict[str, Call]:
    """Calls by name, for GPUs of compute capability ``target``; the kernels of Hopper are of 90 alone."""
    found = dict(attention_calls(target))
    if target == 80:
        found |= {**dict(selection_calls()), **dict(linear_calls()), **dict(pyramid_calls())}
        found |= {**dict(means_calls()), **dict(merge_calls()), **dict(rotary_calls())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, default=90, help="compute capability, such as 90")
    parser.add_argument("--share", default="0/1", help="which of how many shares of the calls")
    parser.add_argument("--only", default="", help="what a call's name must hold")
    asked = parser.parse_args()
    share, shares = map(int, asked.share.split("/"))
    stand_in(asked.target)
    found = launches()
    torch.manual_seed(0)
    known = {name: call for name, call in calls(asked.target).items() if asked.only in name}
    for name, call in list(known.items())[share::shares]:
        found.clear()
        call()
        if not found:
            raise SystemExit(f"{name!r} launched no kernel: it does not run in Triton.")
        seen = dict.fromkeys(found)
        for number, (kernel, ptx, told) in enumerate(seen):
            row = {"name": f"sm_{asked.target} {name} [{number}]", "kernel": kernel, "ptx": ptx, "parameters": told}
            print(json.dumps(row | {"triton": triton.__version__}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
