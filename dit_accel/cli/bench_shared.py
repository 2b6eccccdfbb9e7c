"""``dit-accel bench --context-parallel``: what came out, as a table."""

from __future__ import annotations

from typing import Any

from .console import plain_console


def degrees(processes: int, ring: int | None) -> tuple[int, int]:
    """Ring and Ulysses degree of so many processes; Ulysses alone unless a ring is asked for.

    Raises:
        ValueError: a ring that does not divide them.
    """
    around = 1 if ring is None else ring
    if around < 1 or processes % around:
        raise ValueError(f"--ring must divide --context-parallel {processes}, got {around}.")
    return around, processes // around


def show_shared(data: dict[str, Any]) -> None:
    """A row for each process, then the ratios."""
    from rich.table import Table

    console, table = plain_console(), Table("rank", "density", show_edge=False)
    names = list(data["ranks"][0]["timings"])
    for name in names:
        table.add_column(f"{name} (ms)")
    table.add_column("attention, plan (ms)")
    table.add_column("peak (GiB)")
    for row in data["ranks"]:
        density, spent = row["density"], row["attention_per_forward"]["patched, shared"]
        peak = row["timings"]["patched, shared"]["peak_memory_gib"]
        table.add_row(
            str(row["rank"]),
            "-" if density is None else f"{density:.3f}",
            *(f"{row['timings'][name]['median_s'] * 1000:.1f}" for name in names),
            f"{spent['attention_s'] * 1000:.1f}, {spent['plan_s'] * 1000:.1f}",
            "-" if peak is None else f"{peak:.2f}",
        )
    how, number = data["context_parallel"], data["context_parallel"]["processes"]
    console.print(
        f"{data['arch']}, {data['latent_tokens']} latent tokens, {data['layers']} of {data['of_layers']} layers, on "
        f"{number} processes: ring {how['ring']}, Ulysses {how['ulysses']}"
    )
    console.print(table)
    for name, ratio in data["speedup"].items():
        share = f", {ratio / number:.2f} of linear" if name == "over patched, one" else ""
        console.print(f"patched, shared {name}: {ratio:.2f}x{share}")
    if data["imbalance"] is not None:
        console.print(f"the busiest process has {data['imbalance']:.3f} times the mean work")
    for reason, count in data["ranks"][0]["dense_calls"].items():
        console.print(f"dense calls: {count} ({reason})")
    console.print(
        f"output: relative difference to one process {data['relative_difference']:.3g}, "
        f"{'finite' if data['finite'] else 'NOT finite'}"
    )
