"""What scripts share that judge methods on recorded calls: arguments and report, outputs, and the mass that is kept."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel.call import AttentionCall
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.select.pooled import keep_best, pooled_scores_of


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Of the runs that are recorded, of the density, and where the report goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(**defaults)
    return parser


def size_of_runs(args: argparse.Namespace) -> dict[str, int]:
    """What the arguments say of the runs, as :func:`recorded_calls.run` takes it."""
    return {"width": args.size, "height": args.size, "frames": args.frames, "steps": args.steps}


def report(found: dict[str, Any], args: argparse.Namespace, begin: float) -> None:
    """Print what was found since ``begin``, and write it where that was asked for."""
    found |= {"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": time.monotonic() - begin}
    print(json.dumps(found, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def dense(call: AttentionCall) -> torch.Tensor:
    """Output ``[B, H, S, D]``."""
    q, k, v = (x.transpose(1, 2).float() for x in (call.q, call.k, call.v))
    return F.scaled_dot_product_attention(q, k, v, scale=call.scale)


def sparse(call: AttentionCall, blocks: SequenceBlocks, density: float) -> tuple[torch.Tensor, float]:
    """Output of pooled scores' blocks, and the share of pairs that they are."""
    mask = keep_best(blocks, pooled_scores_of(blocks, call, call.scale), call.key_mask, density=density).to_dense()
    rows = blocks.kernel_rows.reshape(-1).long()
    pairs = mask.repeat_interleave(blocks.block_q, 2).repeat_interleave(blocks.block_k, 3)
    count = call.q.shape[1]
    pairs = pairs[:, :, :count, :count]
    q, k, v = (x.transpose(1, 2)[:, :, rows].float() for x in (call.q, call.k, call.v))
    out = torch.empty_like(q)
    out[:, :, rows] = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=call.scale)
    return out, float(pairs.float().mean())


def mass_kept(
    call: AttentionCall, blocks: SequenceBlocks, mass: torch.Tensor, scores: torch.Tensor, density: float
) -> float:
    """Mean share of the exact ``mass [B, H, nq, nk]`` in the best blocks by ``scores``, as many in each row.

    A block's own keys are not added: where they are not among the best, a row would have more blocks than another, and
    one choice more than another.
    """
    mask = keep_best(blocks, scores, call.key_mask, density=density, keep_own=False)
    shares = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
    return float((shares * mask.to_dense()).sum(-1).mean())
