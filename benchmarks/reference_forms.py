"""Methods of the literature as plain reference forms on recorded calls: what they lose before anybody builds a kernel.

Dense runs of the embedded model are recorded, at every second step, with the prompt (recorded_calls.py); errors are
relative L2 errors of the attention outputs of one prompt or more.
Nothing is trained: these are the places at which a training would begin.

- ``linear``: softmax features; ``flow``: conserved flows (Flowformer, arXiv 2202.06258).
- ``window``: all frames and 0.4 of height and width; ``window + taylor``: beyond it exp to the second order (BASED,
  arXiv 2402.18668), in one softmax; ``taylor``: everywhere.
- ``hyper``: queries and keys sorted by hashes of random planes, blocks of 64 of one place read each other, and as many
  keys sampled for all (HyperAttention, arXiv 2310.05869).
- ``pooled``, ``scaled``: block selection, and the same times the best number for each query and head, which no learned
  scale of the weights (Affine-Scaled Attention) can beat.

    python benchmarks/reference_forms.py --size 128 --frames 17 --out reference_forms.json
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from judged_calls import arguments, dense, report, size_of_runs, sparse
from recorded_calls import calls_in_memory, pipeline
from reuse_front import TUNING_PROMPTS

from dit_accel.call import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.stages.select.learned import Learned
from dit_accel.stages.select.static import Window
from dit_accel.training.gate import blocks_of

PLANES, BLOCK = 12, 64


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Linear attention of softmax features, ``[B, H, S, D]``."""
    told, known = q.softmax(-1), k.softmax(-1)
    return told @ (known.transpose(-1, -2) @ v) / (told @ known.sum(2)[..., None])


def flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Competition among keys and allocation among queries, by flows that are conserved."""
    told, known = q.sigmoid(), k.sigmoid()
    coming = told @ known.sum(2)[..., None]
    going = known @ told.sum(2)[..., None]
    kept_in = told @ (known / going).sum(2)[..., None]
    kept_out = known @ (told / coming).sum(2)[..., None]
    competing = kept_out.softmax(2) * v.shape[2] * v
    return kept_in.sigmoid() * (told / coming @ (known.transpose(-1, -2) @ competing))


def near(call: AttentionCall) -> torch.Tensor:
    """bool ``[S, S]``: the window."""
    assert isinstance(call.layout, TokenLayout)
    axes = Window(window=(1.0, 0.4, 0.4)).visibility(call.layout.grid)
    frame, row, column = (table.bool() for table in axes)
    seen = (
        frame[:, None, None, :, None, None] & row[None, :, None, None, :, None] & column[None, None, :, None, None, :]
    )
    return seen.reshape(call.layout.num_latent, -1)


def weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-30)


def hyper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Blocks of alike hashes, and sampled keys that stand for all others."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(q.shape[-1], PLANES, generator=generator)
    place = 2 ** torch.arange(PLANES)

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = (x @ planes > 0).long()
        gray = bits.clone()
        for n in range(PLANES - 2, -1, -1):  # neighbours in a Gray code differ in one plane
            gray[..., n] = gray[..., n + 1] ^ bits[..., n]
        return (gray * place).sum(-1).argsort(-1)

    of_q, of_k = order(q), order(k)
    count = q.shape[2]
    block = torch.empty_like(of_q).scatter_(2, of_q, (torch.arange(count) // BLOCK).expand_as(of_q).contiguous())
    other = torch.empty_like(of_k).scatter_(2, of_k, (torch.arange(count) // BLOCK).expand_as(of_k).contiguous())
    same = block[..., :, None] == other[..., None, :]
    sample = torch.zeros(count, dtype=torch.bool)
    sample[torch.randperm(count, generator=generator)[:BLOCK]] = True
    logits = scale * q @ k.transpose(-1, -2)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weighted(torch.where(same, weights, weights * sample * (count / BLOCK)), v)


def forms(call: AttentionCall) -> dict[str, torch.Tensor]:
    """Outputs ``[B, H, S, D]`` by name."""
    q, k, v = (x.transpose(1, 2).float() for x in (call.q, call.k, call.v))
    logits, seen = call.scale * q @ k.transpose(-1, -2), near(call)
    # As the paper has it the features are of scaled queries and keys: 1 + x + x^2 / 2.
    taylor = 1 + logits + logits.square() / 2
    exact = dense(call)
    pooled = sparse(call, blocks_of(call, Learned()), 0.1)[0]
    best = (exact * pooled).sum(-1, keepdim=True) / pooled.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return {
        "linear": linear(q, k, v),
        "flow": flow(q, k, v),
        "taylor": weighted(taylor, v),
        "window": logits.masked_fill(~seen, -math.inf).softmax(-1) @ v,
        "window + taylor": weighted(torch.where(seen, logits.exp(), taylor), v),
        "hyper": hyper(q, k, v, call.scale),
        "pooled": pooled,
        "scaled": best * pooled,
    }


def tuning_calls(args: argparse.Namespace) -> list[AttentionCall]:
    """Calls of `--prompts` dense runs, of prompts that no table reports."""
    prompts = enumerate(TUNING_PROMPTS[2 : 2 + args.prompts], 2000)
    return calls_in_memory(pipeline(args.device), prompts, density=args.density, **size_of_runs(args))


def main() -> None:
    parser = arguments(__doc__, device="cpu")
    parser.add_argument("--prompts", type=int, default=1)
    args = parser.parse_args()
    begin = time.monotonic()
    torch.set_grad_enabled(False)
    tests = tuning_calls(args)
    errors: dict[str, float] = {}
    norm = density = 0.0
    for call in tests:
        exact, found = dense(call), forms(call)
        norm += float(exact.square().sum())
        density += float(near(call).float().mean()) / len(tests)
        for name, out in found.items():
            errors[name] = errors.get(name, 0.0) + float((out - exact).square().sum())
    result: dict[str, Any] = {"calls": len(tests), "tokens": tests[0].q.shape[1], "density of the window": density}
    result |= {"errors": {name: math.sqrt(error / norm) for name, error in errors.items()}}
    report(result, args, begin)


if __name__ == "__main__":
    main()
