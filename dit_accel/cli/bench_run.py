"""What ``dit-accel bench --pipeline`` shows: two runs, stage by stage."""

from __future__ import annotations

import statistics
from typing import Any

from .console import plain_console


def show_run(data: dict[str, Any]) -> None:
    """Seconds of a whole run's stages on both sides, and what the numbers stand for."""
    from rich.table import Table
    from rich.text import Text

    console = plain_console()
    console.print(
        Text(data["arch"], style="bold"),
        f"{data['width']}x{data['height']}, {data['frames']} frames, {data['latent_tokens']} latent tokens, "
        f"{data['num_steps']} steps, {data['layers']} of {data['of_layers']} layers measured, {data['dtype']}, "
        f"{'compiled' if data['compiled'] else 'eager'}, on {data['device']['name']}",
    )
    table = Table("whole run", "text", "steps", "of them blocks", "decoding", "total", show_edge=False)
    for side, title in (("dense", f"dense ({data['dense_backend']})"), ("fast", "accelerated")):
        runs = data[side]["whole"]
        stages = (
            [run["text"] for run in runs],
            [sum(run["steps"]) for run in runs],
            [run["blocks"] for run in runs],
            [run["decode"] for run in runs],
            [run["total"] for run in runs],
        )
        table.add_row(title, *(f"{statistics.median(seconds):.2f} s" for seconds in stages))
    console.print(table)
    low, high = data["speedup_range"]
    count = len(data["fast"]["whole"])
    ends = f"{low:.2f}x to {high:.2f}x over {count} of each, in turns" if count > 1 else "one of each: no spread"
    summary = data["summary"]
    density = "-" if summary["mean_density"] is None else f"{summary['mean_density']:.3f}"
    console.print(f"speed-up {data['speedup']:.2f}x ({ends}); mean density of all attention calls {density}")
    for line in _inside(summary):
        console.print(line)
    for line in (*summary["changes"], *summary["notes"]):
        console.print(line)
    for note in data["notes"]:
        console.print(f"note: {note}")


def _inside(summary: dict[str, Any]) -> list[str]:
    """Where the accelerated side's time went, as far as the patch knows."""
    lines = []
    if summary["computed_share"] is not None:
        lines.append(f"accelerated side: {summary['computed_share']:.2f} of the forwards ran all blocks")
    seconds = {name: summary[f"{name}_seconds"] for name in ("sparse", "dense", "plan")}
    lines.append(
        f"its attention, in all runs and the warm-up: {seconds['sparse']:.2f} s sparse, {seconds['dense']:.2f} s "
        f"dense, {seconds['plan']:.2f} s planning"
    )
    return lines
