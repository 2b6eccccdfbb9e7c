"""Patterns of a whole run put together: per layer and head, over denoising steps; JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..files import write_text, written_whole
from .pattern_images import MapPanel, map_sheet, value_table
from .patterns import BlockPattern, density_for_mass, keep_for_mass, pattern_change, recall_of

FILE = "patterns.json"


@dataclass(frozen=True, eq=False)
class Observation:
    """One attention call of a run.

    Attributes:
        layer: index of the self-attention layer.
        step: denoising step.
        order: name of the token order whose blocks the pattern counts, e.g. ``"tiles"``.
        pattern: of that call; batch entries are averaged in reports.
        sigma: noise level, if known.
    """

    layer: int
    step: int
    order: str
    pattern: BlockPattern
    sigma: float | None = None


@dataclass(frozen=True)
class HeadFinding:
    """One head of one layer under one token order, averaged over the observed steps.

    Attributes:
        density: share of block pairs that keeps the target mass.
        recall: share of the true mass that the recipe's mask kept; None where no mask was observed.
        mask_density: kept share of block pairs of that mask.
        change: mean share of mass that moved between one observed step and the next; None with one step.
        reuse_recall: mass kept when each step used the previous step's blocks for the target mass; None with
            one step.
    """

    layer: int
    head: int
    order: str
    density: float
    recall: float | None
    mask_density: float | None
    change: float | None
    reuse_recall: float | None


@dataclass(frozen=True)
class Inspection:
    """Findings of every layer, head and order."""

    target: float
    steps: tuple[int, ...]
    findings: tuple[HeadFinding, ...]

    def mean_density(self, order: str) -> float:
        """Mean over layers and heads of the density that keeps the target mass.

        Raises:
            ValueError: nothing was observed under this order.
        """
        densities = [f.density for f in self.findings if f.order == order]
        if not densities:
            known = sorted({f.order for f in self.findings})
            raise ValueError(f"nothing was observed for order {order!r}; known are {', '.join(known)}.")
        return sum(densities) / len(densities)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready tree with the means per order first."""
        orders = list(dict.fromkeys(f.order for f in self.findings))
        return {
            "format": "dit_accel.inspection",
            "version": 1,
            "target_mass": self.target,
            "steps": list(self.steps),
            "mean_density": {order: self.mean_density(order) for order in orders},
            "findings": [vars(finding).copy() for finding in self.findings],
        }


def inspect_patterns(observations: Sequence[Observation], target: float = 0.95) -> Inspection:
    """Average observations over steps, per layer, head and order.

    Raises:
        ValueError: no observations, or two of the same layer, step and order.
    """
    groups = _groups(observations)
    findings: list[HeadFinding] = []
    for (layer, order), group in groups.items():
        density = torch.stack([_heads(density_for_mass(o.pattern.mass, target)) for o in group]).mean(0)
        masked = [o.pattern for o in group if o.pattern.keep is not None]
        recall = mask_density = change = reuse = None
        if masked:
            recall = torch.stack([_heads(p.recall) for p in masked if p.recall is not None]).mean(0)
            mask_density = torch.stack([_heads(p.keep.float().mean((-1, -2))) for p in masked if p.keep is not None])
            mask_density = mask_density.mean(0)
        if len(group) > 1:
            moves, kept = [], []
            for before, after in pairwise(group):
                moves.append(_heads(pattern_change(before.pattern.mass, after.pattern.mass)))
                old = keep_for_mass(before.pattern.mass, target)
                kept.append(_heads(recall_of(after.pattern.mass, old, after.pattern.row_tokens)))
            change, reuse = torch.stack(moves).mean(0), torch.stack(kept).mean(0)
        for head in range(len(density)):
            findings.append(
                HeadFinding(
                    layer=layer,
                    head=head,
                    order=order,
                    density=density[head].item(),
                    recall=_at(recall, head),
                    mask_density=_at(mask_density, head),
                    change=_at(change, head),
                    reuse_recall=_at(reuse, head),
                )
            )
    steps = tuple(sorted({o.step for o in observations}))
    return Inspection(target, steps, tuple(findings))


def write_inspection(
    observations: Sequence[Observation],
    folder: Path,
    *,
    target: float = 0.95,
    facts: Mapping[str, str] | None = None,
) -> Inspection:
    """Write ``patterns.json``, one map sheet per layer and order, and one table per order and quantity.

    Sheets are ``maps_<order>_layer<NN>.png``: a row per head, a column per step, beside each map what the
    mask kept of it. Tables are ``density_<order>.png``, ``recall_<order>.png`` (with masks) and
    ``change_<order>.png`` (with several steps): layers by heads.

    Returns:
        The findings that were written.

    Raises:
        ValueError: nothing was observed, or a file cannot be written; the message names it.
    """
    inspection = inspect_patterns(observations, target)
    tree = {**inspection.to_json(), "facts": dict(facts or {})}
    write_text(folder / FILE, json.dumps(tree, indent=1, allow_nan=False) + "\n")
    for (layer, order), group in _groups(observations).items():
        sheet = map_sheet(f"Layer {layer}, {order} order: share of attention mass by block", _panels(group, target))
        _save(sheet, folder / f"maps_{_file_name(order)}_layer{layer:02d}.png")
    for order in dict.fromkeys(f.order for f in inspection.findings):
        for quantity, title in (
            ("density", f"Density that keeps {target:.0%} of the mass, {order} order"),
            ("recall", f"Share of the mass that the mask keeps, {order} order"),
            ("change", f"Share of the mass that moves between observed steps, {order} order"),
        ):
            rows = _table(inspection, order, quantity)
            if rows:
                names = [f"layer {layer}" for layer in rows]
                table = value_table(title, names, list(rows.values()))
                _save(table, folder / f"{quantity}_{_file_name(order)}.png")
    return inspection


def _save(picture: Any, path: Path) -> None:
    with written_whole(path) as draft:
        picture.save(draft)


def _groups(observations: Sequence[Observation]) -> dict[tuple[int, str], list[Observation]]:
    """Observations by layer and order, each group in order of steps."""
    if not observations:
        raise ValueError("there is nothing to inspect: no attention call was observed.")
    keys = [(o.layer, o.step, o.order) for o in observations]
    if len(set(keys)) != len(keys):
        raise ValueError("a layer was observed twice at one step under one order.")
    groups: dict[tuple[int, str], list[Observation]] = {}
    for observation in sorted(observations, key=lambda o: (o.order, o.layer, o.step)):
        groups.setdefault((observation.layer, observation.order), []).append(observation)
    return groups


def _heads(value: torch.Tensor) -> torch.Tensor:
    """``[H]`` on the CPU from ``[B, H]``."""
    return value.mean(0).double().cpu()


def _at(values: torch.Tensor | None, head: int) -> float | None:
    return None if values is None else values[head].item()


def _panels(group: Sequence[Observation], target: float) -> list[list[MapPanel]]:
    heads = group[0].pattern.mass.shape[1]
    rows = []
    for head in range(heads):
        row = []
        for o in group:
            mass = o.pattern.mass[0, head].cpu()
            keep = None if o.pattern.keep is None else o.pattern.keep[0, head].cpu()
            sigma = "" if o.sigma is None else f", sigma {o.sigma:.2f}"
            caption = f"head {head}, step {o.step}{sigma}"
            detail = f"{target:.0%} of the mass in {density_for_mass(mass, target).item():.3f}"
            if keep is not None and o.pattern.recall is not None:
                recall = o.pattern.recall[0, head].item()
                detail += f"; mask {keep.float().mean().item():.3f} keeps {recall:.3f}"
            row.append(MapPanel(mass, keep, caption, detail))
        rows.append(row)
    return rows


def _table(inspection: Inspection, order: str, quantity: str) -> dict[int, list[float]]:
    """One value per head, by layer; only layers that have the quantity."""
    rows: dict[int, list[float]] = {}
    for finding in inspection.findings:
        value = getattr(finding, quantity)
        if finding.order == order and value is not None:
            rows.setdefault(finding.layer, []).append(value)
    return rows


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
