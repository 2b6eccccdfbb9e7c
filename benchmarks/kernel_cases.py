"""Masks, checks and anchors that the kernel benchmarks share."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.kernels import BlockMask

BLOCKS = ((128, 128), (128, 64), (64, 64))
DENSITIES = (0.05, 0.1, 0.2)


DRY = os.environ.get("KERNELS_DRY") == "1"  # run everything once, untimed, to fill the compilers' caches


def median_ms(function: Callable[[], object], rep: int = 60) -> float:
    if DRY:
        function()
        return math.nan
    return triton.testing.do_bench(function, warmup=20, rep=rep, return_mode="median")


def device_ms(function: Callable[[], object]) -> float:
    """Median of a replayed CUDA graph: no gaps between launches, as in a model that keeps the GPU busy."""
    if DRY:
        return math.nan
    with torch.no_grad():
        return triton.testing.do_bench_cudagraph(function, rep=25, return_mode="median")


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float) -> BlockMask:
    nq, nk = -(-length // block_q), -(-length // block_k)
    picked = torch.rand(1, heads, nq, nk, device="cuda").argsort(-1)[..., : max(1, int(nk * density))]
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool, device="cuda").scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


def operations(q: torch.Tensor, mask: BlockMask) -> float:
    batch, length, heads, dim = q.shape
    return 4 * batch * heads * length * length * dim * float(mask.density())


def oracle_error(out: torch.Tensor, q, k, v, mask: BlockMask, rows=None, samples: int = 4) -> float:
    """Relative error of a few query blocks of ``out`` against float64 attention over their kept keys."""
    nq, _ = mask.num_blocks
    worst = 0.0
    for n in range(samples):
        head, block = (5 * n) % q.shape[2], (nq - 1) * n // max(1, samples - 1)
        slots = torch.arange(block * mask.block_q, min((block + 1) * mask.block_q, q.shape[1]), device=q.device)
        kept = mask.kv_indices[0, min(head, mask.kv_indices.shape[1] - 1), block]
        kept = kept[: int(mask.kv_num_blocks[0, min(head, mask.kv_indices.shape[1] - 1), block])].long()
        keys = (kept[:, None] * mask.block_k + torch.arange(mask.block_k, device=q.device)).flatten()
        keys = keys[keys < k.shape[1]]
        if rows is not None:
            slots, keys = rows[0, head, slots].long(), rows[0, head, keys].long()
        scores = q[0, slots, head].double() @ k[0, keys, head].double().T / math.sqrt(q.shape[-1])
        exact = scores.softmax(-1) @ v[0, keys, head].double()
        error = (out[0, slots, head].double() - exact).norm() / exact.norm()
        worst = max(worst, error.item()) if error.isfinite() else math.nan
    return worst


class Report:
    """Rows of one run; a failing item is recorded and the run goes on."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, function: Callable[[], dict[str, object]], **labels: object) -> dict[str, object]:
        try:
            row = {**labels, **function()}
        except Exception as error:
            traceback.print_exc(limit=3)
            row = {**labels, "error": f"{type(error).__name__}: {str(error)[:160]}"}
        self.rows.append(row)
        text = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print("  ".join(text), flush=True)
        return row


def inputs(length: int, heads: int, dim: int) -> list[torch.Tensor]:
    return [torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def dense_cudnn(q, k, v) -> Callable[[], torch.Tensor]:
    head_major = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*head_major)

    return call


def dense_backward_cudnn(q, k, v, grad) -> Callable[[], object]:
    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))

    return call


def dense_fa4(q, k, v) -> Callable[[], torch.Tensor]:
    """flash-attn-4, dense; raises ImportError where it is not installed."""
    from flash_attn.cute import flash_attn_func

    return lambda: flash_attn_func(q, k, v)[0]


def sparse_fa4(q, k, v, mask: BlockMask) -> Callable[[], torch.Tensor]:
    """flash-attn-4 on the blocks of ``mask``, its lists made beforehand."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from dit_accel.kernels.flash_attn4 import block_lists

    lists = block_lists(mask.kv_num_blocks, mask.kv_indices, mask.kv_num_full, mask.block_k, mask.kv_len)
    blocks = BlockSparseTensorsTorch(*lists, block_size=(mask.block_q, mask.block_k))
    return lambda: flash_attn_func(q, k, v, block_sparse_tensors=blocks, return_lse=True)[0]
