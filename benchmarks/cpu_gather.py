"""Time the gather backend against dense attention on the CPU, in alternation.

    python benchmarks/cpu_gather.py [--json out.json]

Shape of a small video: 5,184 tokens, 4 heads, head dim 64, density 0.2, 2 threads. The reported speed-up is
the ratio of the medians of alternating runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dit_accel.kernels import BlockMask, block_sparse_attention


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two functions, run in turns so that a busy machine slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    first(), second()
    for _ in range(repeats):
        for function, record in zip((first, second), times):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float) -> BlockMask:
    nq, nk = -(-length // block_q), -(-length // block_k)
    picked = torch.rand(1, heads, nq, nk).argsort(-1)[..., : max(1, round(nk * density))]
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool).scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=5184)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, args.length, args.heads, args.head_dim).to(dtype) for _ in range(3))
        dense = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(  # noqa: E731
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        for block_q, block_k in ((64, 64), (128, 64)):
            mask = random_mask(args.heads, args.length, block_q, block_k, args.density)
            sparse = lambda q=q, k=k, v=v, mask=mask: block_sparse_attention(  # noqa: E731
                q, k, v, mask, backend="torch"
            )
            dense_s, sparse_s = alternate(dense, sparse, args.repeats)
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "block_q": block_q,
                "block_k": block_k,
                "density": float(mask.density()),
                "dense_s": dense_s,
                "sparse_s": sparse_s,
                "speedup": dense_s / sparse_s,
            }
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                )
            )
    if args.json:
        setup = {key: str(value) for key, value in vars(args).items()}
        record = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "args": setup,
        }
        args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
