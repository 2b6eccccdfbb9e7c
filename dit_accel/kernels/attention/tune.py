"""Measure launch configurations on this GPU and write them as a table that ``tuning`` reads."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..common import capability
from ..common.choice import case_of
from ..mask.block_mask import BlockMask
from .api import block_sparse_attention
from .launch_configs import LaunchConfig
from .tuning import entry_key

BLOCKS = ((128, 128), (128, 64), (64, 64))
# The density at which configurations are compared: between the sparsest and the densest in common use.
_DENSITY = 0.1
_FA4_DENSITIES = (0.05, 0.1, 0.2)
_CLEARLY = 0.98  # of our time: below what differs from run to run nothing is won
Measure = Callable[[Callable[[], object]], float]


def median_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call on the GPU, caches cleared between runs."""
    from triton.testing import do_bench

    value: float = do_bench(call, warmup=10, rep=30, return_mode="median")
    return value


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float, device: torch.device) -> BlockMask:
    """Uniformly random blocks, as many in every row."""
    nq, nk = -(-length // block_q), -(-length // block_k)
    picked = torch.rand(1, heads, nq, nk, device=device).argsort(-1)[..., : max(1, int(nk * density))]
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool, device=device).scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


@dataclass(frozen=True)
class _Sizes:
    """Which calls are measured; it goes to other processes too."""

    device: torch.device
    length: int
    heads: int
    dims: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def inputs(self, dim: int, count: int) -> Iterator[torch.Tensor]:
        """Random normal ``[1, length, heads, dim]``."""
        for _ in range(count):
            yield torch.randn(1, self.length, self.heads, dim, device=self.device, dtype=self.dtype)

    def mask(self, block_q: int, block_k: int, density: float) -> BlockMask:
        return random_mask(self.heads, self.length, block_q, block_k, density, self.device)


def tune(
    device: torch.device,
    *,
    length: int = 16384,
    heads: int = 12,
    dims: tuple[int, ...] = (128, 64),
    blocks: tuple[tuple[int, int], ...] = BLOCKS,
    dtype: torch.dtype = torch.bfloat16,
    measure: Measure = median_ms,
    progress: Callable[[str], None] = lambda _stage: None,
    workers: int = 0,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Time every launch configuration of the portable kernels, and flash-attn-4 where it runs.

    Args:
        device: where to run; the table is for GPUs of its name.
        length, heads: tokens and heads of the measured calls, random normal inputs.
        measure: gives the milliseconds of a call.
        progress: told what is being timed.
        workers: processes that first compile everything side by side into Triton's cache; 0 compiles as it goes.
        seconds: configurations that are not reached in this time are left out.

    Returns:
        A table for :mod:`~dit_accel.kernels.attention.tuning`: ``entries`` and ``fa4_fastest``; and ``measured``, a row
        per configuration with its milliseconds, or with the error that it raised.
    """
    until = time.monotonic() + seconds
    measured: list[dict[str, Any]] = []
    sizes = _Sizes(device, length, heads, dims, blocks, dtype)
    with _compiling(workers, sizes, progress):
        # Meanwhile flash-attn-4, whose compiler is another, in this process: it keeps nothing on disk.
        fa4_cases = _fa4_cases(sizes, progress, measured, until)
    fastest = _fa4_fastest(fa4_cases, measure, progress, measured, until)
    best: dict[str, tuple[float, list[int]]] = {}
    for key, config, call in _candidates(sizes):
        progress(f"{key} with {config.num_warps} warps, {config.num_stages} stages")
        row: dict[str, Any] = {"entry": key, "warps": config.num_warps, "stages": config.num_stages}
        measured.append(row)
        if time.monotonic() > until:
            row["error"] = "out of time"
            continue
        try:
            row["ms"] = measure(call)
        except Exception as error:  # a configuration that does not fit the GPU is no candidate
            row["error"] = _short(error)
            continue
        if row["ms"] < best.get(key, (math.inf, []))[0]:
            best[key] = (row["ms"], [config.num_warps, config.num_stages])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "entries": {key: config for key, (_, config) in sorted(best.items())},
        "fa4_fastest": fastest,
        "measured": measured,
    }


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _candidates(sizes: _Sizes) -> Iterator[tuple[str, LaunchConfig, Callable[[], object]]]:
    """Every entry with every configuration, and a call of it."""
    for dim in sizes.dims:
        q, k, v, grad = sizes.inputs(dim, 4)
        rows = torch.rand(1, sizes.heads, sizes.length, device=sizes.device).argsort(-1).to(torch.int32)
        for block_q, block_k in sizes.blocks:
            yield from _configurations(q, k, v, grad, sizes.mask(block_q, block_k, _DENSITY), rows)


def _configurations(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, mask: BlockMask, rows: torch.Tensor
) -> Iterator[tuple[str, LaunchConfig, Callable[[], object]]]:
    from .triton.backward import backward
    from .triton.forward import forward

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


def _compiling(workers: int, sizes: _Sizes, progress: Callable[[str], None]) -> AbstractContextManager[object]:
    """While it is open, processes run all candidates once on short inputs; leaving it waits for them."""
    if workers <= 0:
        return nullcontext()
    progress(f"compiling in {workers} processes")
    # Not forked: a child could not use the GPU that this process has opened.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    for worker in range(workers):
        # The kernels are not compiled for a length, so that short inputs make the same ones.
        pool.submit(_compile_share, worker, workers, replace(sizes, length=1024))
    return pool


def _compile_share(worker: int, workers: int, sizes: _Sizes) -> None:
    for number, (_, _, call) in enumerate(_candidates(sizes)):
        if number % workers == worker:
            try:
                call()
            except Exception:  # recorded when it is measured
                continue


def default_workers() -> int:
    """Processes to compile with: one a core, of which few bring anything beyond a dozen."""
    return min(12, os.cpu_count() or 1)


def _fa4_cases(
    sizes: _Sizes, progress: Callable[[str], None], measured: list[dict[str, Any]], until: float
) -> dict[str, list[tuple[float, Callable[..., object]]]]:
    """Forwards that flash-attn-4 can run, with the result that ours has, by entry: ``(density, call)``."""
    cases: dict[str, list[tuple[float, Callable[..., object]]]] = {}
    for dim in sizes.dims:
        q, k, v = sizes.inputs(dim, 3)
        for block_q, block_k in sizes.blocks:
            key = entry_key("forward", block_q, block_k, dim, False)
            progress(f"{key} on fa4")
            calls: list[tuple[float, Callable[..., object]]] = []
            for density in _FA4_DENSITIES:
                mask = sizes.mask(block_q, block_k, density)
                reason = capability.why_not_fa4(case_of(q, k, v, mask=mask))
                call: Callable[..., Any] = partial(block_sparse_attention, q, k, v, mask)
                if reason is None and time.monotonic() > until:
                    reason = "out of time"
                if reason is None:
                    try:
                        reason = _disagreement(call(backend="fa4"), call(backend="triton"))
                    except Exception as error:
                        reason = _short(error)
                if reason is not None:
                    measured.append({"entry": key, "backend": "fa4", "density": density, "error": reason})
                    break
                calls.append((density, call))
            else:
                cases[key] = calls
    return cases


def _disagreement(theirs: torch.Tensor, ours: torch.Tensor) -> str | None:
    difference = ((theirs - ours).float().norm() / ours.float().norm()).item()
    # Two roundings of weights and of outputs apart; a block too many or too few is a tenth and more.
    return None if difference < 2e-2 else f"its output differs from ours by {difference:.1e}"


def _fa4_fastest(
    cases: dict[str, list[tuple[float, Callable[..., object]]]],
    measure: Measure,
    progress: Callable[[str], None],
    measured: list[dict[str, Any]],
    until: float,
) -> list[str]:
    """Entries that flash-attn-4 ran clearly faster than our kernels at every density."""
    fastest = []
    for key, calls in cases.items():
        wins = True
        for density, call in calls:
            progress(f"{key} on triton and fa4, density {density}")
            times: dict[str, float] = {"triton": math.inf, "fa4": math.inf}
            for _ in range(2):  # in turns: the clock falls under load
                for backend in times:
                    if time.monotonic() <= until:
                        times[backend] = min(times[backend], measure(partial(call, backend=backend)))
            for backend, ms in times.items():
                row = {"entry": key, "backend": backend, "density": density}
                measured.append({**row, "ms": ms} if ms < math.inf else {**row, "error": "out of time"})
            wins = wins and times["fa4"] < _CLEARLY * times["triton"] and times["triton"] < math.inf
        if wins:
            fastest.append(key)
    return fastest
