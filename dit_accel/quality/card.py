"""A card: what accelerating one model gave on one machine, to keep, to send, and to stand in a table with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_text
from .measurement import number_from_json
from .metrics import METRICS
from .ran import all_dense_calls
from .results import DENSE, ComparisonReport, result_to_json, summary_to_json
from .sequence import Sequence

FILE, ROW = "card.json", "row.md"
FORMAT, VERSION = "dit_accel.card", 1
HEAD = (
    "| model | run | machine | recipe | dense, s | accelerated, s | times as fast | PSNR, dB | SSIM | LPIPS | flicker "
    "| density, steps computed |"
)


def make_card(
    report: ComparisonReport,
    *,
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    recipes: Mapping[str, Any],
    sequence: Sequence | None,
    random_weights: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """A card as plain data for JSON.

    Args:
        report: of the runs.
        environment: device, platform and versions.
        settings: of the runs, plain data: dtype, whether compiled, arguments of the call.
        recipes: each recipe as plain data, by its name in the report.
        sequence: of the model at this size, where it is known.
        random_weights: whether the model's are, so that fidelity means nothing.
        note: of the sender, such as what else ran on the machine.
    """
    first = report.results[0]
    frames, height, width = first.shape or (None, None, None)
    seeds = list(dict.fromkeys(seed for _, seed in report.pairs))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": report.facts.get("model", report.pipeline),
        "pipeline": report.pipeline,
        "random_weights": random_weights,
        "note": note,
        "command": report.facts.get("command"),
        **environment,
        "width": width,
        "height": height,
        "frames": frames,
        "sequence": None if sequence is None else asdict(sequence),
        "num_steps": first.stages[0].count if first.stages else None,
        "settings": dict(settings),
        "prompts": list(dict.fromkeys(prompt for prompt, _ in report.pairs)),
        "seeds": seeds,
        "clips": len(report.pairs),
        "repeat": len(first.seconds),
        "warm_up": report.facts.get("warm-up"),
        "runs": report.facts.get("runs"),
        "dense": _side(report, DENSE),
        "recipes": [_side(report, name) | {"settings": recipes[name]} for name in report.recipes],
        # Every run's seconds, stages, metrics and calls; pictures stay at home.
        "results": [result_to_json(result) | {"clip": None} for result in report.results],
        "notes": list(report.notes),
    }


def _side(report: ComparisonReport, name: str) -> dict[str, Any]:
    runs = [result.ran for result in report.results if result.recipe == name and result.ran is not None]
    found = {key: value for key, value in summary_to_json(report.summary(name)).items() if key != "clips"}
    if not runs:
        return found
    densities = [run.density for run in runs if run.density is not None]
    return found | {
        "sparse_density": sum(densities) / len(densities) if densities else None,
        "dense_calls": all_dense_calls(runs),
        "sparse_calls": sum(run.sparse_calls for run in runs),
        "nan_calls": sum(run.nan_calls for run in runs),
    }


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """Write ``card.json`` and its rows for a table, ``row.md``.

    Raises:
        ValueError: a file cannot be written.
    """
    write_text(folder / FILE, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / ROW, "\n".join(card_rows(card)) + "\n")


def read_card(path: Path) -> dict[str, Any]:
    """A card of a file, of which :func:`card_rows` can be made.

    Raises:
        ValueError: not such a file; the message names it.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if (card["format"], card["version"]) != (FORMAT, VERSION):
            raise ValueError(f"expected {FORMAT} version {VERSION}, got {card['format']!r} version {card['version']!r}")
        card_rows(card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(f"{path} is not a card of dit-accel verify: {reason}.") from error
    return dict(card)


def card_rows(card: Mapping[str, Any]) -> list[str]:
    """A row of Markdown for each recipe of a card, under :data:`HEAD`."""
    return [_row(card, recipe) for recipe in card["recipes"]]


def _row(card: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    steps, share = card["num_steps"], recipe["computed_share"]
    computed = "" if steps is None or share is None else f", {steps * share['mean']:.0f} of {steps}"
    density = "-" if recipe["density"] is None else f"{recipe['density']['mean']:.3f}"
    cells = [
        card["model"] + (" (random weights)" if card["random_weights"] else ""),
        run_of(card),
        card["device"]["name"],
        recipe["recipe"],
        f"{card['dense']['total_seconds']['median']:.2f}",
        f"{recipe['total_seconds']['median']:.2f}",
        interval_text(recipe["speedup"], 2, "median"),
        *(_metric(card, recipe, name) for name in ("psnr", "ssim", "lpips", "flicker")),
        f"{density}{computed}",
    ]
    return f"| {' | '.join(escaped(str(cell)) for cell in cells)} |"


def run_of(card: Mapping[str, Any]) -> str:
    """Size, tokens, steps, numbers and clips of a card in words."""
    frames = "" if card["frames"] == 1 else f" x {card['frames']}"
    tokens = "" if card["sequence"] is None else f", {card['sequence']['latent_tokens']:,} tokens"
    steps = "" if card["num_steps"] is None else f", {card['num_steps']} steps"
    settings = card["settings"]
    how = ", ".join([settings["dtype"], "compiled" if settings["compiled"] else "eager", *beside(card)])
    clips = f"{card['clips']} clip{'' if card['clips'] == 1 else 's'}"
    return f"{card['width']} x {card['height']}{frames}{tokens}{steps}, {how}, {clips}"


def beside(card: Mapping[str, Any]) -> list[str]:
    """What of the accelerated side is changed beside attention, in words. Cards before these settings have none."""
    settings = card["settings"]
    linear, vae = settings.get("linear"), settings.get("vae")
    found = ["CUDA graphs"] if settings.get("graphs") else []
    found += [f"linear layers in {linear}"] if linear else []
    return found + ([f"autoencoder {vae}"] if vae else [])


def _metric(card: Mapping[str, Any], recipe: Mapping[str, Any], name: str) -> str:
    found = recipe["metrics"].get(name)
    return "-" if found is None or card["random_weights"] else interval_text(found, METRICS[name].digits, "mean")


def interval_text(found: Mapping[str, Any], digits: int, middle: str) -> str:
    """``35.00 (30.00 to 40.00)`` of an interval as JSON holds it; without the ends where one clip has none.

    Args:
        middle: ``mean`` or ``median``.
    """
    ends = [_number(found[end], digits) for end in (middle, "low", "high")]
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if found["count"] > 1 else ends[0]


def _number(value: float | str, digits: int) -> str:
    number = number_from_json(value)
    return f"{number:.{digits}f}"


def escaped(text: str) -> str:
    """Text in a cell of a table, whoever wrote it: no markup, no other cell, no other line."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "|[]`*_\\" else letter for letter in plain)
