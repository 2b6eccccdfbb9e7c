"""The fidelity sweep as a picture, fidelity against density, and as a table in Markdown.

python benchmarks/fidelity_plot.py results/fidelity_h200.json --png fidelity.png > fidelity.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_accel.quality.bootstrap import FEWEST_CLIPS

MARKS = "osD^v<>Pphd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", help="drawn; default: all")
    parser.add_argument("--only", action="store_true", help="the table too has only --methods")
    parser.add_argument("--costs", action="store_true", help="a table of plans and seconds in place of SSIM and others")
    parser.add_argument("--weights", action="store_true", help="the table of PARO's score weight alone")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    rows = [row for path in args.files for row in json.loads(path.read_text())["rows"] if row.get("metrics")]
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = methods.setdefault(row["method"], [])
        # A floor of a method gives one point, however often it was asked for less.
        if all(abs(row["density"] - other["density"]) > 1e-4 for other in known):
            known.append(row)
    if args.weights:
        weights(methods)
        return
    shown = {name: methods[name] for name in args.methods} if args.only and args.methods else methods
    costs(shown) if args.costs else table(shown)
    if args.png:
        draw({name: methods[name] for name in args.methods or methods}, args.png)


def table(methods: dict[str, list[dict[str, Any]]]) -> None:
    """Methods from the best to the worst, by PSNR at the density nearest to 0.3."""
    print(
        f"| method | density | PSNR, dB ({spread(methods)}) | SSIM | flicker | latent MSE |\n|---|---|---|---|---|---|"
    )

    def at_third(rows: list[dict[str, Any]]) -> float:
        return float(min(rows, key=lambda row: abs(row["density"] - 0.3))["metrics"]["psnr"]["mean"])

    for name, rows in sorted(methods.items(), key=lambda item: -at_third(item[1])):
        for row in sorted(rows, key=lambda row: -row["density"]):
            psnr, ssim, flicker, latent = (row["metrics"][key] for key in ("psnr", "ssim", "flicker", "latent_mse"))
            print(
                f"| {name} | {row['density']:.3f} | {psnr['mean']:.2f} ({psnr['low']:.1f}-{psnr['high']:.1f}) "
                f"| {ssim['mean']:.4f} | {flicker['mean']:.2f} | {latent['mean']:.4f} |"
            )


def spread(methods: dict[str, list[dict[str, Any]]]) -> str:
    """What low and high of the rows are: files older than the key "kind" have bootstraps of any number of clips."""
    counts = [row["metrics"]["psnr"]["count"] for rows in methods.values() for row in rows]
    return "95 %" if min(counts) >= FEWEST_CLIPS else f"range of {min(counts)} clips or more"


def costs(methods: dict[str, list[dict[str, Any]]]) -> None:
    """What plans cost: how many a layer made in a run, and seconds of planning and of sparse attention."""
    print(f"| method | density | PSNR, dB ({spread(methods)}) | plans a layer | planning, s | sparse attention, s |")
    print("|---|---|---|---|---|---|")
    for name, rows in methods.items():
        for row in sorted(rows, key=lambda row: -row["density"]):
            psnr = row["metrics"]["psnr"]
            print(
                f"| {name} | {row['density']:.3f} | {psnr['mean']:.2f} ({psnr['low']:.1f}-{psnr['high']:.1f}) "
                f"| {row['plans_per_layer']:.1f} | {row['plan_seconds']:.2f} | {row['sparse_seconds']:.2f} |"
            )


def weights(methods: dict[str, list[dict[str, Any]]]) -> None:
    """PARO's score weight: a row each, a column a density."""
    found = {float(name.removeprefix("paro-w")): rows for name, rows in methods.items() if name.startswith("paro-w")}
    asked = sorted({row["asked_density"] for rows in found.values() for row in rows}, reverse=True)
    kind = spread(methods)
    print("| weight of sparse tiles | " + " | ".join(f"PSNR at {density:g}, dB ({kind})" for density in asked) + " |")
    print("|---|" + "---|" * len(asked))
    for weight, rows in sorted(found.items()):
        cells = []
        for density in asked:
            psnr = next((row["metrics"]["psnr"] for row in rows if row["asked_density"] == density), None)
            cells.append("-" if psnr is None else f"{psnr['mean']:.2f} ({psnr['low']:.1f}-{psnr['high']:.1f})")
        print(f"| {weight:g} | " + " | ".join(cells) + " |")


def draw(methods: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """PSNR with its interval against the measured density."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    ends: list[tuple[float, float, str, Any]] = []
    for number, (name, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row["density"])
        mean = [row["metrics"]["psnr"]["mean"] for row in rows]
        spread_of = [
            [row["metrics"]["psnr"]["mean"] - row["metrics"]["psnr"]["low"] for row in rows],
            [row["metrics"]["psnr"]["high"] - row["metrics"]["psnr"]["mean"] for row in rows],
        ]
        colour = colours(number % 10)
        axes.errorbar(
            [row["density"] for row in rows],
            mean,
            yerr=spread_of,
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            linewidth=1.2,
            linestyle="-" if number < 10 else "--",
            elinewidth=0.6,
            color=colour,
        )
        ends.append((mean[-1], rows[-1]["density"], name, colour))
    axes.axhline(30, color="0.6", linewidth=0.8, linestyle="--")
    axes.annotate("the goal at density 0.3", (0.4, 28.8), color="0.4", fontsize=8)
    axes.set_xlabel("density of the sparse calls (measured)")
    axes.set_ylabel("PSNR to dense, dB")
    axes.grid(alpha=0.25)
    name_curves(axes, ends)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def name_curves(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Each curve's name to the right of all, as high as its end where there is room; a thin line leads to it."""
    low, high = axes.get_ylim()
    room = (high - low) / 32
    right = max(density for _, density, _, _ in ends)
    below = high
    for value, density, name, colour in sorted(ends, key=lambda one: -one[0]):
        height = min(value, below)
        below = height - room
        axes.annotate(
            name,
            (density, value),
            (right + 0.025, height),
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4},
            annotation_clip=False,
        )
    axes.set_xlim(right=right + 0.02)


if __name__ == "__main__":
    main()
