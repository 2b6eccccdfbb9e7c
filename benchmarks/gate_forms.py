"""Each form of a learned gate, trained on recorded calls and judged on those of other prompts.

Queries, keys and values of the embedded model's layers are recorded from dense runs, at every second step, with the
prompt. A gate for each layer is trained on them by the divergence of its softmax from the exact mass, as the objective
"gate" does, and then chooses blocks in the calls of prompts that it has not seen. The recall is the exact mass that its
blocks hold over that of the best blocks, as many in each row. A block reads its own keys only where they are the best.

    python benchmarks/gate_forms.py --size 128 --frames 17 --train 2 --held-out 1 --updates 60 --out forms.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from reuse_front import TUNING_PROMPTS

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.pipelines.embedded_model import SETTINGS, load_embedded
from dit_accel.stages.select.gate_forms import FORMS
from dit_accel.stages.select.learned import Learned, gate_divergence
from dit_accel.stages.select.pooled import keep_best, pooled_scores_of
from dit_accel.training.gate import blocks_of, exact_mass


def recorded(pipe: Any, prompts: list[str], seed: int, args: argparse.Namespace) -> list[AttentionCall]:
    """Calls of dense runs, every second step, the first branch alone."""
    found: list[AttentionCall] = []

    def see(_name: str, call: AttentionCall) -> None:
        if call.plan is not None and (call.step.index or 0) % 2 == 0 and call.step.branch in ("cond", None):
            found.append(call)

    with dit_accel.patch(pipe, "seer", density=args.density) as handle:
        keep = lambda _layer, out, dense: out if dense is None else dense()  # noqa: E731
        with handle.observe(see), handle.tap_outputs(keep), torch.no_grad():
            for number, prompt in enumerate(prompts):
                pipe(
                    prompt,
                    width=args.size,
                    height=args.size,
                    num_frames=args.frames,
                    num_inference_steps=args.steps,
                    guidance_scale=SETTINGS.guidance,
                    generator=torch.Generator("cpu").manual_seed(seed + number),
                    output_type="latent",
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--train", type=int, default=2, help="prompts to train on")
    parser.add_argument("--held-out", type=int, default=1, help="prompts to judge on")
    parser.add_argument("--updates", type=int, default=60, help="of each layer's gate, a call each")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    pipe = load_embedded(torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = TUNING_PROMPTS[: args.train + args.held_out]
    calls = recorded(pipe, prompts[: args.train], 1000, args)
    tests = recorded(pipe, prompts[args.train :], 2000, args)
    found: dict[str, Any] = {"calls": len(calls), "held out": len(tests), "tokens": calls[0].q.shape[1]}
    base = Learned(density=args.density)
    prepared = {}
    for call in [*calls, *tests]:
        blocks = blocks_of(call, base)
        prepared[id(call)] = blocks, base.prepare(blocks), exact_mass(call, blocks)
    kept: dict[str, float] = {"exact": 0.0, "pooled": 0.0}
    for call in tests:
        blocks, _, mass = prepared[id(call)]
        share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
        for name, scores in (
            ("exact", share.clamp_min(1e-38).log()),
            ("pooled", pooled_scores_of(blocks, call, call.scale)),
        ):
            mask = keep_best(blocks, scores, call.key_mask, density=args.density, keep_own=False)
            kept[name] += float((share * mask.to_dense()).sum(-1).mean())
    found["recall without a gate"] = kept["pooled"] / kept["exact"]
    for form in FORMS:
        select, total = Learned(density=args.density, form=form), 0.0
        for layer in sorted({call.layer for call in calls}):
            own = [call for call in calls if call.layer == layer]
            gate = select.build(own[0].q.shape[2], own[0].q.shape[3]).to(args.device)
            optimizer = torch.optim.Adam(gate.parameters(), lr=args.learning_rate)
            for update in range(args.updates):
                call = own[update % len(own)]
                call.router = gate
                blocks, tables, mass = prepared[id(call)]
                loss = gate_divergence(blocks, tables, select, call, mass)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for call in (one for one in tests if one.layer == layer):
                call.router = gate
                blocks, tables, mass = prepared[id(call)]
                share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
                with torch.no_grad():
                    mask = keep_best(blocks, select.scores(blocks, tables, call), call.key_mask, density=args.density)
                total += float((share * mask.to_dense()).sum(-1).mean())
        found[f"recall of the form {form}"] = total / kept["exact"]
        print(form, total / kept["exact"], f"{time.monotonic() - begin:.0f} s", flush=True)
    found |= {"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": time.monotonic() - begin}
    print(json.dumps(found, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
