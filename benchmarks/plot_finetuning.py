"""Draw what ``sparse_finetuning.py`` brought back: curves from its JSON, and a contact sheet from its clips.

python benchmarks/plot_finetuning.py benchmarks/results/h100_finetuning.json docs/images/finetuning.png
python benchmarks/plot_finetuning.py results/clips.safetensors docs/images/finetuning_clips.webp
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONG = ("sla-0.05", "sla-0.05-distilled", "sla-0.1")
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


def draw(axes: Any, variants: Mapping[str, Any], names: Sequence[str], title: str) -> None:
    """One panel: excess of the validation loss over the dense model's, in per cent."""
    for name in names:
        points = variants.get(name, {}).get("evaluations", [])
        excess = [100 * (point["flow_loss"] / point["dense_flow_loss"] - 1) for point in points]
        axes.plot([point["step"] for point in points], excess, marker=".", label=name)
    axes.axhline(2, color="0.5", linestyle=":", label="goal at 0.05: 2 %")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step (8 clips each); step 0 is training-free")
    axes.set_ylabel("validation loss above dense, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper right", ncols=2)
    # Room above the curves for the names.
    axes.set_ylim(top=axes.get_ylim()[1] * (1.2 + 0.04 * len(names)))


def plot_curves(results: Path, picture: Path) -> None:
    """Three panels: SLA to the end of the time, other methods, ablations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    variants = json.loads(results.read_text())["variants"]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw(left, variants, LONG, "SLA, tiles of 16 tokens")
    draw(middle, variants, METHODS, "other methods, and the dense control")
    draw(right, variants, [name for name in variants if name not in LONG + METHODS], "ablations at 0.05")
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
    parser.add_argument("source", type=Path, help="JSON for curves, safetensors for a contact sheet")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    (contact_sheet if args.source.suffix == ".safetensors" else plot_curves)(args.source, args.picture)


if __name__ == "__main__":
    main()
