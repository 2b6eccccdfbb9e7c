"""What sorting keys inside segments (PBS-Attn, arXiv 2510.21270) costs or gains, on the laboratory's recorded calls.

Queries lie in tiles of 4 x 4 x 4 latent tokens. Keys lie in the same tiles, or sorted by attention inside segments of
several sizes; ``both`` sorts queries with their keys, as the preset once did. Blocks of 128 queries and 64 keys are
chosen by block means or by the exact mass. Errors are relative L2 errors of the attention output to float64, over
calls of one prompt or more, of every n-th query block.

    python benchmarks/laboratory.py --record --prompts 1
    python benchmarks/sorted_keys.py --out sorted_keys.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from laboratory import FIRST_SEED, FOLDER
from recorded_calls import Recorded, read

from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.layout import StepContext
from dit_accel.plan import SequenceBlocks
from dit_accel.run import Run
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.order.sorted import SortedSegments
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled

CPU = torch.device("cpu")
SEGMENTS = ((4, 16, 16), (4, 8, 8), (4, 8, 4), (4, 4, 4))


def orders(call: AttentionCall) -> Iterator[tuple[str, torch.Tensor | None, AttentionCall]]:
    """Name, rows of the kernels, and the call with its keys in their places."""
    tiles = Tiles().rows(call.layout, CPU)
    yield "tiles", tiles, call
    for segment in SEGMENTS:
        order = SortedSegments(segment)
        keys = order.keys_of_call(call.layout, call)
        yield f"keys sorted in {segment}", order.rows_of_call(call.layout, call), call.with_keys(keys)
        if segment == SEGMENTS[0]:
            both = keys[..., tiles.long()]  # the token at each slot, of queries and keys alike
            yield f"both sorted in {segment}", both[0], call


def errors(call: AttentionCall, density: float, every: int) -> Iterator[tuple[str, float, float]]:
    """Name, squared error and squared norm of each order under each selection."""
    q, k, v = (x[0].transpose(0, 1) for x in (call.q, call.k, call.v))
    for name, rows, moved in orders(call):
        slots = rows.long().expand(q.shape[0], -1)
        blocks = SequenceBlocks(call.layout, rows, 128, 64, CPU)
        seen_k, seen_v = (x[0].transpose(0, 1) for x in (moved.k, moved.v))
        picked = torch.arange(every // 2, blocks.num_blocks[0], every)
        places = slots.unflatten(1, (-1, 128))[:, picked].flatten(1)
        asked = q.gather(1, places[..., None].expand(-1, -1, q.shape[2])).double()
        exact = (asked @ k.double().transpose(1, 2) * call.scale).softmax(-1) @ v.double()
        seen_k, seen_v = (x.gather(1, slots[..., None].expand_as(x)).double() for x in (seen_k, seen_v))
        weights = (asked @ seen_k.transpose(1, 2) * call.scale).softmax(-1)
        for select in (Pooled(density=density, keep_own=False), Mass(density=density, head_adaptive=False)):
            kept = select.select(blocks, select.prepare(blocks), moved).to_dense()[0, :, picked]
            shown = weights * kept.repeat_interleave(128, 1).repeat_interleave(64, 2)
            out = shown @ seen_v / shown.sum(-1, keepdim=True).clamp_min(1e-20)
            yield (
                f"{name}, {type(select).__name__.lower()}",
                float((out - exact).square().sum()),
                float(exact.square().sum()),
            )


def as_call(one: Recorded) -> AttentionCall:
    inputs = AttentionInputs(*(x.float().transpose(0, 1)[None] for x in (one.q, one.k, one.v)))
    return AttentionCall.of(one.layer, inputs, one.layout, StepContext(), Run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the recorded calls")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--steps", type=int, nargs="+", default=[18])
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--every", type=int, default=4, help="score every n-th query block")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)
    sums: dict[str, list[float]] = {}
    calls = 0
    for one in read(args.folder, [FIRST_SEED + n for n in range(args.prompts)]):
        if one.layer not in args.layers or one.step not in args.steps or one.branch != "cond":
            continue
        calls += 1
        for name, error, norm in errors(as_call(one), args.density, args.every):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + error, total[1] + norm
    found = {name: math.sqrt(error / norm) for name, (error, norm) in sums.items()}
    facts = {name: str(value) for name, value in vars(args).items() if name not in ("out", "folder")}
    result = {"facts": {**facts, "calls": calls, "device": "CPU", "torch": torch.__version__}, "errors": found}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
