"""Measure launch configurations on this GPU and write them as a table that ``tuning`` reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from . import capability
from .block_mask import BlockMask
from .block_sparse import block_sparse_attention
from .tuning import LaunchConfig, entry_key

BLOCKS = ((128, 128), (128, 64), (64, 64))
# The density at which configurations are compared: between the sparsest and the densest in common use.
_DENSITY = 0.1
_FA4_DENSITIES = (0.05, 0.1, 0.2)
Measure = Callable[[Callable[[], object]], float]


def median_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call on the GPU, caches cleared between runs."""
    from triton.testing import do_bench

    value: float = do_bench(call, warmup=20, rep=40, return_mode="median")
    return value


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float, device: torch.device) -> BlockMask:
    """Uniformly random blocks, as many in every row."""
    nq, nk = -(-length // block_q), -(-length // block_k)
    picked = torch.rand(1, heads, nq, nk, device=device).argsort(-1)[..., : max(1, int(nk * density))]
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool, device=device).scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


def tune(
    device: torch.device,
    *,
    length: int = 16384,
    heads: int = 12,
    dims: tuple[int, ...] = (128, 64),
    blocks: tuple[tuple[int, int], ...] = BLOCKS,
    dtype: torch.dtype = torch.bfloat16,
    measure: Measure = median_ms,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Time every launch configuration of the portable kernels, and flash-attn-4 where it runs.

    Args:
        device: where to run; the table is for GPUs of its name.
        length, heads: tokens and heads of the measured calls, random normal inputs.
        measure: gives the milliseconds of a call.
        progress: told what is being timed.

    Returns:
        A table for :mod:`~dit_accel.kernels.tuning`: ``entries`` and ``fa4_fastest``; and ``measured``, one row
        a configuration with its milliseconds, or with the error that it raised.
    """
    measured: list[dict[str, Any]] = []
    best: dict[str, tuple[float, list[int]]] = {}
    for dim in dims:
        q, k, v, grad = (torch.randn(1, length, heads, dim, device=device, dtype=dtype) for _ in range(4))
        rows = torch.rand(1, heads, length, device=device).argsort(-1).to(torch.int32)
        for block_q, block_k in blocks:
            mask = random_mask(heads, length, block_q, block_k, _DENSITY, device)
            for key, config, call in _candidates(q, k, v, grad, mask, rows):
                progress(f"{key} with {config.num_warps} warps, {config.num_stages} stages")
                row: dict[str, Any] = {"entry": key, "warps": config.num_warps, "stages": config.num_stages}
                measured.append(row)
                try:
                    row["ms"] = measure(call)
                except Exception as error:  # a configuration that does not fit the GPU is no candidate
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                    continue
                if row["ms"] < best.get(key, (math.inf, []))[0]:
                    best[key] = (row["ms"], [config.num_warps, config.num_stages])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "entries": {key: config for key, (_, config) in sorted(best.items())},
        "fa4_fastest": _fa4_fastest(device, length, heads, dims, blocks, dtype, measure, progress, measured),
        "measured": measured,
    }


def _candidates(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, mask: BlockMask, rows: torch.Tensor
) -> Iterator[tuple[str, LaunchConfig, Callable[[], object]]]:
    from .triton_backward import backward
    from .triton_forward import forward

    dim = q.shape[-1]
    scale, usual = dim**-0.5, LaunchConfig(8, 1)
    lse = torch.full((1, q.shape[2], q.shape[1]), 12.0, device=q.device)
    for op in ("forward", "backward_dq", "backward_dkv"):
        for order in (None, rows):
            if order is not None and op != "forward":
                continue  # the backward reorders its inputs first
            key = entry_key(op, mask.block_q, mask.block_k, dim, order is not None)
            for warps in (4, 8):
                for stages in (2, 3, 4) if op == "forward" else (1, 2, 3):
                    config = LaunchConfig(warps, stages)
                    if op == "forward":
                        yield key, config, partial(forward, q, k, v, mask, order, None, scale, config)
                        continue
                    dq, dkv = (config, usual) if op == "backward_dq" else (usual, config)
                    call = partial(backward, q, k, v, mask, None, None, scale, q, lse, grad, None)
                    yield key, config, partial(call, config_dq=dq, config_dkv=dkv)


def _fa4_fastest(
    device: torch.device,
    length: int,
    heads: int,
    dims: tuple[int, ...],
    blocks: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    measure: Measure,
    progress: Callable[[str], None],
    measured: list[dict[str, Any]],
) -> list[str]:
    """Forwards that flash-attn-4 ran faster than our backends at every density."""
    fastest = []
    for dim in dims:
        q, k, v = (torch.randn(1, length, heads, dim, device=device, dtype=dtype) for _ in range(3))
        for block_q, block_k in blocks:
            key, wins = entry_key("forward", block_q, block_k, dim, False), True
            for density in _FA4_DENSITIES:
                mask = random_mask(heads, length, block_q, block_k, density, device)
                reason = capability.why_not_fa4(q, mask)
                if reason is not None:
                    measured.append({"entry": key, "backend": "fa4", "error": reason})
                    wins = False
                    break
                times = {}
                for backend in ("triton", "fa4"):
                    progress(f"{key} on {backend}, density {density}")
                    times[backend] = measure(partial(block_sparse_attention, q, k, v, mask, backend=backend))
                    measured.append({"entry": key, "backend": backend, "density": density, "ms": times[backend]})
                wins = wins and times["fa4"] < times["triton"]
            if wins:
                fastest.append(key)
    return fastest
