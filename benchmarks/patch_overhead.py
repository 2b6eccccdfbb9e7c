"""Time what a patch itself costs: the `dense` recipe on a tiny Wan transformer, per attention call.

    python benchmarks/patch_overhead.py [--json out.json]

Patched and unpatched forwards of one model alternate; the difference of the medians, divided by the attention
calls
of a forward, is the overhead. The goal is at most 50 us a call. One thread does
all the work and its CPU time is taken, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import dit_accel
from dit_accel.cli.environment import environment

GOAL_US = 50.0


def tiny_model(layers: int) -> torch.nn.Module:
    """So small that little but overhead is left."""
    torch.manual_seed(0)
    model: torch.nn.Module = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=32, num_layers=layers
    )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda the host's time is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    plain = tiny_model(args.layers).to(device)
    patched = copy.deepcopy(plain)
    inputs = [tensor.to(device) for tensor in (torch.randn(1, 16, 2, 8, 8), torch.ones(1), torch.randn(1, 4, 16))]
    seconds: dict[str, list[float]] = {"plain": [], "patched": []}
    with torch.no_grad(), dit_accel.patch(patched, "dense") as handle:
        for _ in range(args.repeats):
            for name, model in (("plain", plain), ("patched", patched)):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.thread_time()
                model(*inputs)
                seconds[name].append(time.thread_time() - start)
    calls = sum(handle.summary().dense_calls.values())
    assert calls == args.layers * args.repeats, calls
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = (medians["patched"] - medians["plain"]) / args.layers * 1e6
    record = {
        **environment(device),
        "layers": args.layers,
        "repeats": args.repeats,
        **{f"{name}_forward_s": value for name, value in medians.items()},
        "overhead_us_per_call": overhead,
        "goal_us_per_call": GOAL_US,
        "goal_met": overhead <= GOAL_US,
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
