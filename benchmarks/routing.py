"""Check and time selection, exact block mass and the linear branch on one GPU.

    python benchmarks/routing.py --out benchmarks/results/routing_h200.json

Every item runs on its own: one that fails is reported and the rest goes on. Times are medians of
``triton.testing.do_bench`` in milliseconds; cuDNN's dense attention is timed in the same run. Checks compare
with float64 on the GPU and raise on a miss, so an item's time stands only beside a passed check.
"""

from __future__ import annotations

import argparse
import json
import platform
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench, do_bench_cudagraph

from dit_accel.kernels.linear.api import add_linear_branch, linear_branch, marginal_map
from dit_accel.kernels.linear.triton import forward as triton_linear
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.kernels.selection.api import pool_blocks, pooled_scores, select_blocks, select_pooled
from dit_accel.kernels.selection.block_mass import block_mass
from dit_accel.kernels.selection.triton.pooling import pool_pair_triton

HEADS, DIM = 12, 128
RESULTS: list[dict[str, object]] = []


DRY = False


def median(fn: Callable[..., object], *args: object, **kwargs: object) -> float:
    if DRY:
        fn(*args, **kwargs)
        return 0.0
    return do_bench(lambda: fn(*args, **kwargs), warmup=15, rep=60, return_mode="median")


def device_median(fn: Callable[..., object], *args: object, **kwargs: object) -> float:
    """Without launch gaps: a replayed CUDA graph."""
    if DRY:
        return median(fn, *args, **kwargs)
    with torch.no_grad():
        return do_bench_cudagraph(lambda: fn(*args, **kwargs), rep=30, return_mode="median")


def record(name: str, value: float | str, unit: str = "ms") -> None:
    RESULTS.append({"name": name, "value": value, "unit": unit})
    print(f"{name:74s} {value if isinstance(value, str) else f'{value:.4g}'} {unit}", flush=True)


def item(name: str, fn: Callable[[], None]) -> None:
    try:
        fn()
    except Exception as error:  # the run must reach its end
        traceback.print_exc(limit=4)
        record(name, f"FAILED {type(error).__name__}: {str(error)[:150]}", "")
    torch.cuda.empty_cache()


def draw(seq: int, heads: int = HEADS, dim: int = DIM, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    gen = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, seq, heads, dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=gen) for _ in range(4)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    error = (got.double() - want.double()).norm() / want.double().norm()
    if not torch.isfinite(error):
        raise AssertionError("result is not finite")
    return error.item()


def require(name: str, value: float, bound: float) -> None:
    record(name, value, f"(bound {bound:g})")
    if not value <= bound:
        raise AssertionError(f"{name}: {value} exceeds {bound}")


def same_lists(a: BlockMask, b: BlockMask) -> None:
    assert torch.equal(a.kv_num_blocks, b.kv_num_blocks), "counts differ"
    assert torch.equal(a.kv_num_full, b.kv_num_full), "full counts differ"
    width = min(a.kv_indices.shape[-1], b.kv_indices.shape[-1])
    listed = torch.arange(width, device="cuda") < a.kv_num_blocks[..., None]
    assert torch.equal(a.kv_indices[..., :width] * listed, b.kv_indices[..., :width] * listed), "lists differ"


def check_selection() -> None:
    for seq, block_q, block_k in ((32760, 128, 64), (9001, 64, 64), (5000, 128, 128)):
        q, k, _, _ = draw(seq, heads=3, batch=2)
        rows = torch.rand(2, 3, seq, device="cuda").argsort(-1).int()
        key_mask = torch.rand(2, seq, device="cuda") > 0.2
        key_mask[0, : 3 * block_k] = False
        for order, mask in ((None, None), (rows, key_mask)):
            got = pool_blocks(k, block_k, rows=order, key_mask=mask)
            want = pool_blocks(k.double(), block_k, rows=order, key_mask=mask, backend="torch")
            require(f"pool_blocks S={seq} rows={order is not None} rel. error", relative(got, want), 1e-6)
        scores = pooled_scores(q, k, block_q, block_k)
        scores[0, 1] = scores[0, 1].mul(8).round()
        scores[1, 0, 5] = torch.nan
        nq, nk = scores.shape[2:]
        forced_q, forced_k = torch.rand(nq, device="cuda") < 0.05, torch.rand(2, nk, device="cuda") < 0.05
        partial = torch.rand(nk, device="cuda") < 0.1
        empty = torch.rand(2, 3, nk, device="cuda") < 0.1
        geometry = {"block_q": block_q, "block_k": block_k, "q_len": seq, "kv_len": seq}
        for args in (
            {"density": 0.1},
            {"density": 0.03, "keep_own": False},
            {"top_p": 0.3},
            {"density": 0.05, "top_p": 0.2, "forced_q": forced_q, "forced_k": forced_k, "empty_k": empty},
            {"density": torch.rand(2, 3, device="cuda") * 0.3 + 0.01, "partial_k": partial},
        ):
            a = select_blocks(scores, **geometry, **args)
            b = select_blocks(scores, **geometry, **args, backend="torch")
            # Masses are integers of rounded exponentials; a choice on the edge may differ by the last bit.
            if "top_p" in args:
                wrong = (a.to_dense() != b.to_dense()).float().mean().item()
                require(f"select S={seq} {sorted(args)} share of differing pairs", wrong, 1e-5)
            else:
                same_lists(a, b)
        record(f"selection lists equal torch's, S={seq} {block_q}x{block_k}", "ok", "")


def time_selection(seq: int) -> None:
    q, k, _, _ = draw(seq)
    args = {"rows": None, "key_mask": None, "scale": 1.0}
    record(f"  pool q and k, device time, S={seq}", device_median(pool_pair_triton, q, k, 128, 64, **args))
    record(f"  read floor of q and k at 4.3 TB/s, S={seq}", 2 * q.numel() * 2 / 4.3e9)
    for block_q, block_k in ((128, 64), (64, 64), (128, 128)):
        name = f"S={seq} {block_q}x{block_k}"
        geometry = {"block_q": block_q, "block_k": block_k, "q_len": seq, "kv_len": seq}
        scores = pooled_scores(q, k, block_q, block_k)
        for label, args in (
            ("top-k .05", {"density": 0.05}),
            ("top-k .2", {"density": 0.2}),
            ("top-p .3", {"top_p": 0.3}),
            ("union", {"density": 0.05, "top_p": 0.3}),
        ):
            record(
                f"  select {label}, device time, {name}",
                device_median(select_blocks, scores, **geometry, **args),
            )
        args = {"block_q": block_q, "block_k": block_k, "density": 0.1}
        record(f"SELECTION pooled top-k .1 all heads, {name}", median(select_pooled, q, k, **args))
        record(f"  its device time, {name}", device_median(select_pooled, q, k, **args))
    rows = torch.rand(1, HEADS, seq, device="cuda").argsort(-1).int()
    record(
        f"SELECTION with per-head permutation, S={seq} 128x64",
        median(lambda: select_pooled(q, k, block_q=128, block_k=64, density=0.1, rows=rows)),
    )


def check_mass() -> None:
    for seq, dim, masked in ((3000, 128, False), (2049, 64, True), (1500, 96, True)):
        q, k, _, _ = draw(seq, heads=2, dim=dim)
        key_mask = torch.rand(1, seq, device="cuda") > 0.3 if masked else None
        rows = torch.rand(1, 2, seq, device="cuda").argsort(-1).int() if masked else None
        args = {"rows": rows, "key_mask": key_mask, "block_q": 128, "block_k": 64}
        mass, lse = block_mass(q, k, **args)
        want, want_lse = block_mass(q.double(), k.double(), **args, backend="torch")
        require(f"block mass S={seq} D={dim} rel. error", relative(mass, want), 1e-4)
        require("its lse, max. error", (lse - want_lse).abs().max().item(), 1e-4)


def time_mass() -> None:
    seq = 32768
    q, k, _, _ = draw(seq)
    _, lse = block_mass(q, k, block_q=128, block_k=64)
    for block_q, block_k in ((128, 64), (64, 64), (128, 128)):
        name = f"S={seq} {block_q}x{block_k}"
        args = {"block_q": block_q, "block_k": block_k}
        record(f"block mass, lse given, {name}", median(block_mass, q, k, lse=lse, **args))
    record(f"block mass with its own lse pass, S={seq} 128x64", median(block_mass, q, k, block_q=128, block_k=64))
    # PSA's sample: a quarter of the tokens of 128 queries and 64 keys.
    small = [x[:, ::4].contiguous() for x in (q, k)]
    record(f"block mass of a quarter's sample, S={seq}/4 32x16", median(block_mass, *small, block_q=32, block_k=16))


def time_mass_tiles() -> None:
    """Tiles, warps and stages of the pass over all logits."""
    from dit_accel.kernels.selection.triton.block_mass import block_mass_triton

    seq = 32768
    q, k = (torch.randn(1, seq, 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    _, lse = block_mass(q, k, block_q=128, block_k=64)
    same = {"block_q": 64, "block_k": 64, "lse": lse, "rows": None, "key_mask": None, "scale": 0.088}
    for tile, warps in (((128, 64), 4), ((128, 64), 8), ((256, 64), 8), ((128, 128), 8), ((256, 128), 8)):
        for stages in (2, 3, 4):
            name = f"block mass 64x64, tile {tile[0]}x{tile[1]}, {warps} warps, {stages} stages"
            try:
                record(name, median(block_mass_triton, q, k, **same, tile=tile, warps=warps, stages=stages))
            except Exception as error:  # too much shared memory, say
                print(f"{name}: {type(error).__name__}")


def linear_oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, marginal: torch.Tensor | None, blocks: tuple[int, int]
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weight = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
    if marginal is not None:
        tokens = marginal.double().repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)
        weight = weight * tokens[:, :, : q.shape[2], : k.shape[2]]
    return (weight @ v / weight.sum(-1, keepdim=True)).transpose(1, 2)


def check_linear() -> None:
    for dim in (64, 96, 128):
        for block_q, block_k in ((128, 64), (64, 64)):
            q, k, v, grad = draw(1900, heads=2, dim=dim)
            critical = select_pooled(q, k, block_q=block_q, block_k=block_k, density=0.05)
            for mask in (critical, None):
                marginal = None if mask is None else marginal_map(mask)
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                exact = [x.double().requires_grad_() for x in (q, k, v)]
                out = linear_branch(*leaves, mask)
                again = linear_branch(q, k, v, mask)
                assert torch.equal(out, again), "two runs differ"
                out.backward(grad)
                want = linear_oracle(*exact, marginal, (block_q, block_k))
                want.backward(grad.double())
                form = "marginal" if mask is not None else "all tokens"
                name = f"linear branch ({form}) D={dim} {block_q}x{block_k}"
                # bf16 rounds phi, states, sums and output once each, 2**-9 apiece at most.
                require(f"{name} rel. error", relative(out, want), 1e-2)
                for letter, leaf, ref in zip("qkv", leaves, exact):
                    require(f"{name} d{letter} rel. error", relative(leaf.grad, ref.grad), 2e-2)


def time_linear(seq: int) -> None:
    q, k, v, grad = draw(seq)
    weight, bias = torch.randn(DIM, DIM, device="cuda"), torch.randn(DIM, device="cuda")
    critical = select_pooled(q, k, block_q=128, block_k=64, density=0.05)
    out = torch.zeros_like(q)
    args = (out, q, k, v, None, weight, bias)
    record(f"linear, all tokens, projected and added, S={seq}", median(add_linear_branch, *args, eps=1e-5))
    record(f"  its device time, S={seq}", device_median(add_linear_branch, *args, eps=1e-5))
    usual = triton_linear.STATE_SHARE
    shares = (0.14, 0.3, 1.0) if seq < 50_000 else (0.14,)
    for share in shares:
        triton_linear.STATE_SHARE = share
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        add_linear_branch(out, q, k, v, critical, weight, bias)
        peak = (torch.cuda.max_memory_allocated() - before) / (4 * q.numel() * 2)
        record(
            f"linear, non-critical, projected and added, 128x64, S={seq}, share {share} (peak {peak:.3f})",
            median(add_linear_branch, out, q, k, v, critical, weight, bias),
        )
        record("  its device time", device_median(add_linear_branch, out, q, k, v, critical, weight, bias))
    triton_linear.STATE_SHARE = usual
    coarse = select_pooled(q, k, block_q=128, block_k=128, density=0.05)
    record(
        f"linear, non-critical, projected and added, 128x128, S={seq}",
        median(add_linear_branch, out, q, k, v, coarse, weight, bias),
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both(mask: BlockMask | None) -> None:
        torch.autograd.grad(linear_branch(*leaves, mask), leaves, grad)

    record(f"linear fwd+bwd, non-critical, S={seq} 128x64", median(both, critical))
    record(f"linear fwd+bwd, all tokens, S={seq}", median(both, None))


def time_linear_parts() -> None:
    """Where the device time of the linear branch goes, all heads at once."""
    seq = 32768
    q, k, v, _ = draw(seq)
    critical = select_pooled(q, k, block_q=128, block_k=64, density=0.05)
    shape = triton_linear.shape_of(q, k, critical)
    weight = torch.randn(DIM, DIM, device="cuda", dtype=q.dtype)
    states = torch.empty(HEADS, seq // 64, shape.state_width, device="cuda", dtype=q.dtype)
    for project in (weight, None):
        args = (k, v, None, None, project, states, shape, "softmax", 0, 0)
        name = "  block states" + (" with projection" if project is not None else "")
        record(name, device_median(triton_linear.launch_block_states, *args))
    marginal = triton_linear.scaled_map(critical, None, q.dtype, 2.0**-9)
    record("  map", device_median(triton_linear.scaled_map, critical, None, q.dtype, 2.0**-9))
    record("  product, 12 heads", device_median(torch.bmm, marginal[0], states))
    record("  product, 2 heads", device_median(torch.bmm, marginal[0, :2], states[:2]))
    sums, out = torch.bmm(marginal[0], states), torch.zeros_like(q)
    args = (q, None, sums, out, None, out, shape, "softmax", 0.0)
    record("  output added, a state per block", device_median(triton_linear.launch_out, *args, group_tokens=128))
    record(
        "  states of all tokens",
        device_median(triton_linear.all_states, k, v, None, weight, shape, "softmax"),
    )
    mean = triton_linear.all_states(k, v, None, weight, shape, "softmax")
    args = (q, None, mean, out, None, out, shape, "softmax", 0.0)
    record("  output added, one state", device_median(triton_linear.launch_out, *args, group_tokens=768))


def time_sla(seq: int) -> None:
    """The whole operation: routing, sparse branch, linear branch, projection, sum."""
    from dit_accel.kernels.attention.api import block_sparse_attention

    q, k, v, _ = draw(seq)
    weight, bias = torch.randn(DIM, DIM, device="cuda"), torch.randn(DIM, device="cuda")

    def sla(block_k: int, every: bool) -> None:
        critical = select_pooled(q, k, block_q=128, block_k=block_k, density=0.05)
        out = block_sparse_attention(q, k, v, critical)
        add_linear_branch(out, q, k, v, None if every else critical, weight, bias)

    for block_k in (64, 128):
        mask = select_pooled(q, k, block_q=128, block_k=block_k, density=0.05)
        name = f"5% 128x{block_k}, S={seq}"
        record(f"sparse branch alone, {name}", median(block_sparse_attention, q, k, v, mask))
        record(f"SLA forward incl. routing, linear over non-critical, {name}", median(sla, block_k, False))
        record(f"SLA forward incl. routing, linear over all tokens, {name}", median(sla, block_k, True))


def time_dense(seq: int) -> None:
    q, k, v = (x.transpose(1, 2) for x in draw(seq)[:3])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        record(f"cuDNN dense, S={seq}", median(F.scaled_dot_product_attention, q, k, v))


ITEMS: dict[str, Callable[[], None]] = {
    "dense 32768": lambda: time_dense(32768),
    "check selection": check_selection,
    "check linear": check_linear,
    "sla 32768": lambda: time_sla(32768),
    "selection 32768": lambda: time_selection(32768),
    "linear parts": time_linear_parts,
    "linear 32768": lambda: time_linear(32768),
    "selection 75600": lambda: time_selection(75600),
    "check mass": check_mass,
    "mass": time_mass,
    "mass tiles": time_mass_tiles,
    "linear 75600": lambda: time_linear(75600),
    "sla 75600": lambda: time_sla(75600),
    "dense 75600": lambda: time_dense(75600),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/routing.json"))
    parser.add_argument("--only", nargs="*", help=f"of: {', '.join(ITEMS)}")
    parser.add_argument("--dry", action="store_true", help="run everything once, untimed: fills Triton's cache")
    args = parser.parse_args()
    global DRY
    DRY = args.dry
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/routing.py" + (f" --only {args.only}" if args.only else ""),
        "heads": HEADS,
        "head_dim": DIM,
        "dtype": "bfloat16",
        "results": RESULTS,
    }
    for name, fn in ITEMS.items():
        if not args.only or any(name.startswith(part) for part in args.only):
            item(name, fn)
            # After every item: a run that is cut short keeps what it measured.
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
