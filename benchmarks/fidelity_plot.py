"""The fidelity sweep as a picture, fidelity against density, and as a table in Markdown.

python benchmarks/fidelity_plot.py results/fidelity_h200.json --png fidelity.png > fidelity.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MARKS = "osD^v<>Pphd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", help="drawn; default: all")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    rows = [row for path in args.files for row in json.loads(path.read_text())["rows"] if row.get("metrics")]
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = methods.setdefault(row["method"], [])
        # A floor of a method gives one point, however often it was asked for less.
        if all(abs(row["density"] - other["density"]) > 1e-4 for other in known):
            known.append(row)
    table(methods)
    if args.png:
        draw({name: methods[name] for name in args.methods or methods}, args.png)


def table(methods: dict[str, list[dict[str, Any]]]) -> None:
    """Methods from the best to the worst, by PSNR at the density nearest to 0.3."""
    print("| method | density | PSNR, dB (95 %) | SSIM | flicker | latent MSE |\n|---|---|---|---|---|---|")

    def at_third(rows: list[dict[str, Any]]) -> float:
        return float(min(rows, key=lambda row: abs(row["density"] - 0.3))["metrics"]["psnr"]["mean"])

    for name, rows in sorted(methods.items(), key=lambda item: -at_third(item[1])):
        for row in sorted(rows, key=lambda row: -row["density"]):
            psnr, ssim, flicker, latent = (row["metrics"][key] for key in ("psnr", "ssim", "flicker", "latent_mse"))
            print(
                f"| {name} | {row['density']:.3f} | {psnr['mean']:.2f} ({psnr['low']:.1f}-{psnr['high']:.1f}) "
                f"| {ssim['mean']:.4f} | {flicker['mean']:.2f} | {latent['mean']:.4f} |"
            )


def draw(methods: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """PSNR with its interval against the measured density."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20"]
    for number, (name, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row["density"])
        mean = [row["metrics"]["psnr"]["mean"] for row in rows]
        ends = [
            [row["metrics"]["psnr"]["mean"] - row["metrics"]["psnr"]["low"] for row in rows],
            [row["metrics"]["psnr"]["high"] - row["metrics"]["psnr"]["mean"] for row in rows],
        ]
        axes.errorbar(
            [row["density"] for row in rows],
            mean,
            yerr=ends,
            label=name,
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.6,
            color=colours(number % 20),
        )
    axes.axhline(30, color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xlabel("density of the sparse calls (measured)")
    axes.set_ylabel("PSNR against dense, dB")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
