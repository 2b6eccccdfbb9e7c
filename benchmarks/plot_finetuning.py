"""Draw the curves of ``results/h200_finetuning.json``: validation loss over dense, by optimizer step.

python benchmarks/plot_finetuning.py benchmarks/results/h200_finetuning.json docs/images/finetuning.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METHODS = ("sla-0.05", "sla-0.1", "sparge2-0.1", "clear-0.1", "ssa-0.1", "dense")


def draw(axes: Any, variants: Mapping[str, Any], names: Sequence[str], title: str) -> None:
    """One panel: excess of the validation loss over the dense model's, in per cent."""
    for name in names:
        points = variants[name]["evaluations"]
        excess = [100 * (point["flow_loss"] / point["dense_flow_loss"] - 1) for point in points]
        axes.plot([point["step"] for point in points], excess, marker=".", label=name)
    axes.axhline(2, color="0.5", linestyle=":", label="goal at 0.05: 2 %")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step (8 clips each); step 0 is training-free")
    axes.set_ylabel("validation loss above dense, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    runs = json.loads(args.results.read_text())
    shared = runs["shared"]["variants"]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw(left, shared, METHODS, "methods, side by side")
    draw(middle, shared, [name for name in shared if name.startswith("sla-")], "SLA: densities and ablations")
    longer = {**runs["longer_0.05"]["variants"], **runs["longer_0.1"]["variants"]}
    draw(right, longer, list(longer), "longer")
    figure.savefig(args.picture, dpi=90)


if __name__ == "__main__":
    main()
