"""How much of the exact attention mass a learned gate of any form keeps, beside pooled scores and the exact choice.

For each sparse call of runs of the built-in model, at one density: the exact mass in the best blocks by the gate, in
those by pooled scores, and in those by that mass itself, as many in each row. The recall is the gate's share of the
last. As in gate_forms.py a block's own keys are not added, which the runs themselves read in any case: a block has them
only where they are among the best. The prompts are those of the fidelity comparison; train the gate on others, with

    dit-accel finetune embedded --recipe seer --set select.form=linear --objective gate --train learned \\
      --prompts-file others.txt --out gate

    python benchmarks/gate_recall.py --adapter gate/adapter --density 0.1 --clips 4 --out recall.json
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from judged_calls import arguments, mass_kept, report, size_of_runs
from recorded_calls import pipeline, run

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.pipelines.embedded_model import SETTINGS
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.stages.select.learned import Learned
from dit_accel.stages.select.pooled import pooled_scores_of
from dit_accel.training.gate import blocks_of, exact_mass


class Recall:
    """Sums of the mass that each choice keeps."""

    def __init__(self, density: float, select: Learned) -> None:
        self.density = density
        self.select = select
        self.sums: dict[str, float] = {"gate": 0.0, "pooled": 0.0, "exact": 0.0}
        self.by_layer: dict[int, list[float]] = {}
        self.calls = 0

    def see(self, _name: str, call: AttentionCall) -> None:
        """One sparse call; every fourth step is looked at."""
        if call.plan is None or (call.step.index or 0) % 4:
            return
        blocks = blocks_of(call, self.select)
        mass = exact_mass(call, blocks)
        scores = {
            "gate": self.select.scores(blocks, self.select.prepare(blocks), call),
            "pooled": pooled_scores_of(blocks, call, call.scale),
            "exact": mass.clamp_min(1e-38).log(),
        }
        shares = {name: mass_kept(call, blocks, mass, each, self.density) for name, each in scores.items()}
        for name, share in shares.items():
            self.sums[name] += share
        self.by_layer.setdefault(call.layer, []).append(shares["gate"] / shares["exact"])
        self.calls += 1

    def report(self) -> dict[str, Any]:
        """Plain data."""
        means = {f"mass kept by {name}": value / self.calls for name, value in self.sums.items()}
        recalls = {f"recall of {name}": self.sums[name] / self.sums["exact"] for name in ("gate", "pooled")}
        layers = {layer: sum(found) / len(found) for layer, found in sorted(self.by_layer.items())}
        return {"density": self.density, "calls": self.calls, **means, **recalls, "recall by layer": layers}


def main() -> None:
    parser = arguments(__doc__, steps=SETTINGS.steps, size=SETTINGS.width, frames=SETTINGS.frames)
    parser.add_argument("--adapter", type=Path, help="of a fine-tuning with the objective gate; none is untrained")
    parser.add_argument("--clips", type=int, default=4)
    args = parser.parse_args()
    pipe = pipeline(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    recipe = dit_accel.presets.seer(density=args.density)
    if args.adapter is None:
        handle = dit_accel.patch(pipe, recipe)
    else:
        from dit_accel.training.adapter_files import read_adapter

        trained = read_adapter(args.adapter).recipe
        recipe = replace(trained, select=trained.select.with_density(args.density))
        handle = dit_accel.load_adapter(pipe, args.adapter, recipe=recipe)
    assert isinstance(recipe.select, Learned)
    recall, begin = Recall(args.density, recipe.select), time.monotonic()
    with handle.observe(recall.see), torch.no_grad():
        run(pipe, enumerate(DEFAULT_PROMPTS[: args.clips]), **size_of_runs(args))
    report(recall.report(), args, begin)


if __name__ == "__main__":
    main()
