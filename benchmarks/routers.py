"""Routers of layers and of heads on recorded calls: what they could save, before anybody trains a model for them.

Dense runs of the embedded model are recorded, at every second step, with the prompt (recorded_calls.py).

- **Layers** (Flux Attention): each call runs dense, or sparse by pooled scores. A router is a ridge regression of the
  logarithm of the sparse call's error on the noise level, its square and the mean and spread of queries and keys,
  fitted for each layer on some prompts and asked on others. At one mean density the calls with the largest errors run
  dense; beside it stand the true errors in its place, layers fixed by their mean error, and no routing: one density
  for all.
- **Heads** (MoH, SHRP): each block of queries keeps the heads that write most (by the norm of a head's dense output
  there, which a router would have to guess), others write nothing. The model is not trained for it, as
  ``compensate=heads`` can be. Beside it stands block selection that reads as many pairs.

Errors are relative L2 errors of the attention output, over all calls.

    python benchmarks/routers.py --size 128 --frames 17 --out routers.json
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from judged_calls import arguments, dense, report, size_of_runs, sparse
from recorded_calls import calls_in_memory, pipeline
from reuse_front import TUNING_PROMPTS

from dit_accel.call import AttentionCall
from dit_accel.stages.select.learned import Learned
from dit_accel.training.gate import blocks_of

SHARES = (0.25, 0.5)
HEADS_KEPT = (0.75, 0.5)


def features(call: AttentionCall) -> torch.Tensor:
    """What a router sees: the noise level, and the pooled state of a layer."""
    q, k = (x.float().transpose(1, 2) for x in (call.q, call.k))
    level = float(call.step.sigma or 0.0)
    sizes = [level, level * level, 1.0]
    for x in (q, k):
        mean = x.mean(2)
        sizes += [float(mean.norm()), float((x - mean[:, :, None]).norm()) / math.sqrt(x.shape[2])]
    sizes.append(float((q.mean(2) * k.mean(2)).sum(-1).mean()))
    return torch.tensor(sizes, dtype=torch.float64)


def layer_router(calls: list[AttentionCall], tests: list[AttentionCall], density: float) -> dict[str, Any]:
    """Errors of each way to route, by the share of calls that run dense."""
    told: dict[int, list[tuple[torch.Tensor, float]]] = {}
    for call in calls:
        blocks = blocks_of(call, Learned())
        error = float((sparse(call, blocks, density)[0] - dense(call)).square().sum())
        told.setdefault(call.layer, []).append((features(call), math.log(error)))
    weights, means = {}, {}
    for layer, pairs in told.items():
        x, y = torch.stack([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs]).double()
        scale = x.std(0).clamp_min(1e-6) + (x.std(0) < 1e-6)
        z = x / scale
        solved = torch.linalg.solve(z.T @ z + 0.1 * torch.eye(z.shape[1]), z.T @ (y - y.mean()))
        weights[layer], means[layer] = (solved / scale, float(y.mean()) - float((z @ solved).mean())), float(y.mean())
    errors, norms, kept, asked, fixed = [], [], [], [], []
    for call in tests:
        blocks, exact = blocks_of(call, Learned()), dense(call)
        got, share = sparse(call, blocks, density)
        errors.append(float((got - exact).square().sum()))
        norms.append(float(exact.square().sum()))
        kept.append(share)
        weight, bias = weights[call.layer]
        asked.append(float(features(call) @ weight) + bias)
        fixed.append(means[call.layer])
    total, found = sum(norms), {"none": math.sqrt(sum(errors) / sum(norms)), "density": sum(kept) / len(kept)}
    for share in SHARES:
        count = round(share * len(tests))
        for name, order in (("router", asked), ("fixed layers", fixed), ("true errors", errors)):
            run_dense = set(sorted(range(len(tests)), key=lambda n: -order[n])[:count])
            left = sum(error for n, error in enumerate(errors) if n not in run_dense)
            found[f"{name}, {share} dense"] = math.sqrt(left / total)
        even = share + (1 - share) * found["density"]
        left = sum(
            float((sparse(call, blocks_of(call, Learned()), even)[0] - dense(call)).square().sum()) for call in tests
        )
        found[f"one density, {even:.3f}"] = math.sqrt(left / total)
    return found


def head_router(tests: list[AttentionCall]) -> dict[str, float]:
    """Errors of keeping some heads for each block of queries, and of keeping as many pairs of blocks."""
    found = {}
    for share in HEADS_KEPT:
        left = chosen = total = 0.0
        for call in tests:
            blocks, exact = blocks_of(call, Learned()), dense(call)
            rows = blocks.kernel_rows.reshape(-1).long()
            size = F.pad(exact[:, :, rows].square().sum(-1), (0, -len(rows) % blocks.block_q))
            size = size.unflatten(2, (-1, blocks.block_q)).sum(-1)  # [B, H, nq]
            heads = size.shape[1]
            least = size.sort(1).values[:, : heads - round(share * heads)]
            left += float(least.sum())
            total += float(size.sum())
            chosen += float((sparse(call, blocks, share)[0] - exact).square().sum())
        found[f"heads, {share} kept"] = math.sqrt(left / total)
        found[f"blocks, {share} kept"] = math.sqrt(chosen / total)
    return found


def main() -> None:
    parser = arguments(__doc__, steps=10)
    parser.add_argument("--train", type=int, default=2, help="prompts to fit the router on")
    parser.add_argument("--held-out", type=int, default=1)
    args = parser.parse_args()
    begin = time.monotonic()
    torch.set_grad_enabled(False)
    pipe = pipeline(args.device)
    prompts, size = TUNING_PROMPTS[: args.train + args.held_out], size_of_runs(args)
    calls = calls_in_memory(pipe, enumerate(prompts[: args.train], 1000), density=args.density, **size)
    tests = calls_in_memory(pipe, enumerate(prompts[args.train :], 2000), density=args.density, **size)
    found: dict[str, Any] = {"calls": len(tests), "tokens": tests[0].q.shape[1]}
    found |= {"layers": layer_router(calls, tests, args.density), "heads": head_router(tests)}
    report(found, args, begin)


if __name__ == "__main__":
    main()
