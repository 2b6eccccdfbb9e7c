"""Each form of a learned gate, trained on recorded calls and judged on those of other prompts.

Queries, keys and values of the embedded model's layers are recorded from dense runs, at every second step, with the
prompt. A gate for each layer is trained on them by the divergence of its softmax from the exact mass, as the objective
"gate" does, and then chooses blocks in the calls of prompts that it has not seen. The recall is the exact mass that its
blocks hold over that of the best blocks, as many in each row. As in gate_recall.py a block's own keys are not added,
which the selection itself adds: a block reads them only where they are among the best.

    python benchmarks/gate_forms.py --size 128 --frames 17 --train 2 --held-out 1 --updates 60 --out forms.json
"""

from __future__ import annotations

import time
from typing import Any

import torch
from judged_calls import arguments, mass_kept, report, size_of_runs
from recorded_calls import calls_in_memory, pipeline
from reuse_front import TUNING_PROMPTS

from dit_accel.stages.select.gate_forms import FORMS
from dit_accel.stages.select.learned import Learned, gate_divergence
from dit_accel.stages.select.pooled import pooled_scores_of
from dit_accel.training.gate import blocks_of, exact_mass


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train", type=int, default=2, help="prompts to train on")
    parser.add_argument("--held-out", type=int, default=1, help="prompts to judge on")
    parser.add_argument("--updates", type=int, default=60, help="of each layer's gate, a call each")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    begin = time.monotonic()
    pipe = pipeline(args.device)
    prompts, size = TUNING_PROMPTS[: args.train + args.held_out], size_of_runs(args)
    calls = calls_in_memory(pipe, enumerate(prompts[: args.train], 1000), density=args.density, **size)
    tests = calls_in_memory(pipe, enumerate(prompts[args.train :], 2000), density=args.density, **size)
    found: dict[str, Any] = {"calls": len(calls), "held out": len(tests), "tokens": calls[0].q.shape[1]}
    base = Learned(density=args.density)
    prepared = {}
    for call in [*calls, *tests]:
        blocks = blocks_of(call, base)
        prepared[id(call)] = blocks, base.prepare(blocks), exact_mass(call, blocks)
    kept: dict[str, float] = {"exact": 0.0, "pooled": 0.0}
    for call in tests:
        blocks, _, mass = prepared[id(call)]
        exact = mass.clamp_min(1e-38).log()
        for name, scores in (("exact", exact), ("pooled", pooled_scores_of(blocks, call, call.scale))):
            kept[name] += mass_kept(call, blocks, mass, scores, args.density)
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
                with torch.no_grad():
                    scores = select.scores(blocks, tables, call)
                total += mass_kept(call, blocks, mass, scores, args.density)
        found[f"recall of the form {form}"] = total / kept["exact"]
        print(form, total / kept["exact"], f"{time.monotonic() - begin:.0f} s", flush=True)
    report(found, args, begin)


if __name__ == "__main__":
    main()
