"""Draw what each step of a run computed, for the docs: the built-in model under a profile.

python benchmarks/steps_picture.py [--recipe fast] [--out docs/images/plan_over_steps.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dit_accel
from dit_accel.patches.steps_svg import plan_over_steps
from dit_accel.pipelines import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompt", default="three rockets standing still in a forest")
    parser.add_argument("--out", type=Path, default=Path("docs/images/plan_over_steps.svg"))
    arguments = parser.parse_args()
    pipe = load("embedded")
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.patch(pipe, arguments.recipe) as handle:
        handle.record_steps()
        pipe(arguments.prompt, num_inference_steps=arguments.steps, generator=torch.Generator().manual_seed(0))
        steps = handle.summary().steps
    # A file knows nothing of the page around it, which may be dark.
    picture = plan_over_steps(steps).replace('style="', 'style="background:#fff;color:#222;', 1)
    arguments.out.write_text(picture + "\n", encoding="utf-8")
    print("\n".join(map(str, steps)))


if __name__ == "__main__":
    main()
