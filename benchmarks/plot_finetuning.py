"""Draw what ``sparse_finetuning.py`` brought back: curves from its JSON, and a contact sheet from its clips.

python benchmarks/plot_finetuning.py benchmarks/results/h?00_finetuning.json docs/images/finetuning.png
python benchmarks/plot_finetuning.py results/clips.safetensors docs/images/finetuning_clips.webp
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONG = ("sla-0.05", "sla-0.05-short", "sla-0.05-distilled", "sla-0.1")
METHODS = ("sparge2-0.1", "clear-0.12", "ssa-0.1", "dense")
# Rows of the contact sheet: label, and the name in the file.
ROWS = {
    "dense": "dense/training-free",
    "sla 0.05, training-free": "sla-0.05-distilled/training-free",
    "sla 0.05, distilled": "sla-0.05-distilled/trained",
    "sla 0.1, training-free": "sla-0.1/training-free",
    "sla 0.1, tuned": "sla-0.1/trained",
    "clear, tuned": "clear-0.12/trained",
}
CLIPS, FRAME = 3, 16


def draw(axes: Any, variants: Mapping[str, Any], names: Sequence[str], title: str, *, goal: bool, wide: bool) -> None:
    """One panel: excess of the validation loss over the dense model's, in per cent.

    Args:
        goal: draw the goal at a density of 0.05 too.
        wide: make the axis logarithmic above 10 per cent, for curves of very different heights.
    """
    for index, name in enumerate(names):
        points = variants.get(name, {}).get("evaluations", [])
        excess = [100 * (point["flow_loss"] / point["dense_flow_loss"] - 1) for point in points]
        # The colours come back after ten names.
        style = {"marker": "o" if index < 10 else "s", "linestyle": "-" if index < 10 else "--", "markersize": 3}
        axes.plot([point["step"] for point in points], excess, label=name, color=f"C{index % 10}", **style)
    if goal:
        axes.axhline(2, color="0.5", linestyle=":", label="goal at 0.05: 2 %")
    if wide:
        axes.set_yscale("symlog", linthresh=10, linscale=2)
        ticks = [tick for tick in (-2, 0, 2, 4, 6, 8, 10, 20, 50, 100) if tick <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step (8 clips each, 16 in sla-0.05); 0 is training-free")
    axes.set_ylabel("validation loss above dense, %" + ("\n(logarithmic above 10)" if wide else ""))
    axes.grid(alpha=0.3)
    # Below the panel, where it covers no curve.
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def plot_curves(results: Sequence[Path], picture: Path) -> None:
    """Three panels: SLA to the end of the time, other methods, ablations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    variants = {name: found for path in results for name, found in json.loads(path.read_text())["variants"].items()}
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw(left, variants, LONG, "SLA, tiles of 16 tokens", goal=True, wide=False)
    draw(middle, variants, METHODS, "other methods, and the dense control", goal=False, wide=True)
    ablations = [name for name in variants if name not in LONG + METHODS]
    draw(right, variants, ablations, "ablations, density 0.05 unless named", goal=True, wide=True)
    figure.savefig(picture, dpi=90)


def contact_sheet(clips: Path, picture: Path) -> None:
    """One frame of the first test clips, a row for each of ``ROWS`` that the file has."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw
    from safetensors.torch import load_file

    from dit_accel.pipelines import load

    vae = load("embedded", dtype=torch.float32).vae.eval()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    tensors = load_file(clips)
    rows = []
    for label, name in ROWS.items():
        if name not in tensors:
            continue
        with torch.no_grad():
            frames = vae.decode(tensors[name][:CLIPS].float() * std + mean).sample[:, :, FRAME]
        strip = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        image = Image.fromarray(np.concatenate(strip, axis=1))
        ImageDraw.Draw(image).text((4, 4), label, fill="white", stroke_width=2, stroke_fill="black")
        rows.append(np.asarray(image))
    if not rows:
        raise SystemExit(f"{clips} has none of {', '.join(ROWS.values())}.")
    Image.fromarray(np.concatenate(rows)).save(picture, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", type=Path, nargs="+", help="JSON files for curves, one safetensors for a contact sheet"
    )
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    if args.sources[0].suffix == ".safetensors":
        contact_sheet(args.sources[0], args.picture)
    else:
        plot_curves(args.sources, args.picture)


if __name__ == "__main__":
    main()
