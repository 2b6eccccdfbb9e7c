"""One version of the package in a process of its own: names its calls, then times the one that each line asks for.

``benchmarks/against.py`` starts it once for each version. It uses public names alone, which both versions have.

    names:    one line of JSON, ``{"calls": {name: error}}``, once all calls are compiled and checked
    request:  a name
    answer:   ``{"ms": milliseconds}``, a mean over a tenth of a second
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import torch

from dit_accel.kernels import BlockMask, block_sparse_attention, pooled_scores, select_pooled

BLOCKS = ((128, 128), (128, 64), (64, 64))
# Seconds of repetition behind one answer.
SPAN = 0.1


def calls(device: torch.device, length: int, heads: int, dim: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls by name, on random inputs that are the same in every version."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = (normal(1, length, heads, dim) for _ in range(3))
    rows = torch.randperm(length, generator=generator).to(device, torch.int32).view(1, 1, -1)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for block_q, block_k in BLOCKS:
        nq, nk = math.ceil(length / block_q), math.ceil(length / block_k)
        keep = torch.rand(1, heads, nq, nk, generator=generator) < 0.15
        keep[..., 0] = True
        mask = BlockMask.from_dense(keep.to(device), block_q, block_k, length, length).trimmed()
        name = f"{block_q}x{block_k}"
        found[f"forward {name}"] = lambda mask=mask: block_sparse_attention(q, k, v, mask)
        found[f"forward permuted {name}"] = lambda mask=mask: block_sparse_attention(q, k, v, mask, rows=rows)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def backward(mask: BlockMask = mask, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            out = block_sparse_attention(*leaves, mask)
            return torch.autograd.grad(out, leaves[0], out.detach())[0]

        found[f"forward and backward {name}"] = backward
    found["pooled scores"] = lambda: pooled_scores(q, k, 128, 64)
    found["select pooled"] = lambda: select_pooled(q, k, block_q=128, block_k=64, density=0.2).kv_num_blocks.float()
    return found


def timed(call: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> float:
    """Mean milliseconds of so many calls, one after the other."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    device = torch.device(options.device)
    known, sums, repeats = calls(device, options.length, options.heads, options.dim), {}, {}
    for name, call in known.items():
        # Two versions must agree on it. A sum of squares moves with any wrong block.
        sums[name] = float(call().double().square().sum())
        repeats[name] = max(1, round(SPAN * 1e3 / timed(call, device, 2)))
    print(json.dumps({"calls": sums}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps({"ms": timed(known[name], device, repeats[name])}), flush=True)


if __name__ == "__main__":
    main()
