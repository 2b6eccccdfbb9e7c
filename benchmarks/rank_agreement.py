"""Do two models rank methods alike? Spearman's correlation, with an interval over the methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

# Of fewer a correlation of ranks says nothing.
FEWEST = 4


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of two rankings.

    Attributes:
        correlation: 1 where both rank alike, -1 where they rank the other way round.
        low, high: ends of a 95 % percentile bootstrap over the methods.
        count: of the methods.
    """

    correlation: float
    low: float
    high: float
    count: int


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, ties at their mean; NaN where all values of one side are equal."""
    ranks = np.stack([rankdata(first), rankdata(second)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def agreement(
    first: Mapping[str, float], second: Mapping[str, float], resamples: int = 2000, seed: int = 0
) -> Agreement | None:
    """Of the methods that both have; None for too few, or where one side ranks nothing."""
    names = sorted(first.keys() & second.keys())
    if len(names) < FEWEST:
        return None
    values = np.asarray([[side[name] for name in names] for side in (first, second)])
    found = spearman(values[0], values[1])
    if np.isnan(found):
        return None
    picks = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    drawn = np.asarray([spearman(*values[:, pick]) for pick in picks])
    low, high = np.quantile(drawn[~np.isnan(drawn)], (0.025, 0.975))
    return Agreement(found, float(low), float(high), len(names))


def small_ranking(files: Sequence[Path]) -> dict[float, dict[str, float]]:
    """PSNR of the fidelity sweep's files by density that was asked for, then by method; later files win."""
    found: dict[float, dict[str, float]] = {}
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            psnr = row.get("metrics", {}).get("psnr")
            if psnr is not None and row["asked_density"] is not None:
                found.setdefault(row["asked_density"], {})[row["method"]] = float(psnr["mean"])
    return found
