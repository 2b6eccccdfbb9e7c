"""How much of the exact attention mass a learned gate of any form keeps, beside pooled scores and the exact choice.

For each sparse call of runs of the built-in model, at one density: the exact mass that the gate's blocks hold, that
those of pooled scores hold, and that the best blocks by that mass hold, all with the blocks that are read in any case.
The recall is the gate's share of the last. The prompts are those of the fidelity comparison; train the gate on others,
with

    dit-accel finetune embedded --recipe seer --set select.form=linear --objective gate --train learned \\
      --prompts-file others.txt --out gate

    python benchmarks/gate_recall.py --adapter gate/adapter --density 0.1 --clips 4 --out recall.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.embedded_model import SETTINGS, load_embedded
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.stages.select.learned import Learned
from dit_accel.stages.select.pooled import keep_best, pooled_scores_of
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
        assert isinstance(call.layout, TokenLayout)
        blocks = blocks_of(call, self.select)
        mass = exact_mass(call, blocks)
        mass = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
        by_means = pooled_scores_of(blocks, call, call.scale)
        pooled, exact = (
            keep_best(blocks, scores, call.key_mask, density=self.density)
            for scores in (by_means, mass.clamp_min(1e-38).log())
        )
        kept = {"gate": call.plan.mask, "pooled": pooled, "exact": exact}
        shares = {name: float((mass * mask.to_dense()).sum(-1).mean()) for name, mask in kept.items()}
        for name, share in shares.items():
            self.sums[name] += share
        self.by_layer.setdefault(call.layer, []).append(shares["gate"] / shares["exact"])
        self.calls += 1

    def report(self) -> dict[str, object]:
        """Plain data."""
        means = {f"mass kept by {name}": value / self.calls for name, value in self.sums.items()}
        recalls = {f"recall of {name}": self.sums[name] / self.sums["exact"] for name in ("gate", "pooled")}
        layers = {layer: sum(found) / len(found) for layer, found in sorted(self.by_layer.items())}
        return {"density": self.density, "calls": self.calls, **means, **recalls, "recall by layer": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="of a fine-tuning with the objective gate; none is untrained")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--size", type=int, default=SETTINGS.width)
    parser.add_argument("--frames", type=int, default=SETTINGS.frames)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pipe = load_embedded(torch.bfloat16 if args.device == "cuda" else torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
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
        for number, prompt in enumerate(DEFAULT_PROMPTS[: args.clips]):
            generator = torch.Generator("cpu").manual_seed(number)
            pipe(
                prompt,
                width=args.size,
                height=args.size,
                num_frames=args.frames,
                num_inference_steps=args.steps,
                guidance_scale=SETTINGS.guidance,
                generator=generator,
                output_type="latent",
            )
    found = recall.report() | {"adapter": str(args.adapter), "seconds": time.monotonic() - begin}
    print(json.dumps(found, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
