"""What a row of the laboratory would take on a GPU: a model of time from measured kernels.

``results/kernels_h200.json`` has calls of the block-sparse forward (128 x 64 blocks, 32,768 tokens, 12 heads of 128) at
three densities: a straight line, whose slope is the time of reading all keys once. A pooled column costs as a key does.
Plans are charged in shares of a dense attention (``results/routing_h200.json``), over the steps that they serve.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
BLOCK_MASS = 0.70
"""One search with a known log-sum-exp: 7.46 ms of 10.7 (128 x 64 blocks)."""
POOLED = 0.0077
"""Pooled scores and top-k: 0.0825 ms of 10.7, device time."""
CELLS = 0.0117
"""The same over 16-token cells: 64 times 128 / 16 more scores, a 256th of a dense attention's, on top. An estimate."""
BLOCKS_OF_64 = 1.45
"""A kept pair with blocks of 64 queries against one of 128: 61 ms against 42, three layers of Wan at 720p.

In the portable kernel, as all of the laboratory's tables; Hopper's takes 1.02 to 1.15 times (docs/performance.md)."""


@dataclass(frozen=True)
class CostModel:
    """Milliseconds of a call.

    Attributes:
        start: of a call that reads nothing.
        whole: of reading every key once.
        dense: of dense attention, the anchor of the plans.
    """

    start: float
    whole: float
    dense: float

    @classmethod
    def measured(cls, path: Path = RESULTS / "kernels_h200.json") -> CostModel:
        """A straight line through the rows of the newest run that has them."""
        runs = json.loads(path.read_text())["runs"]
        for run in reversed(runs):
            rows = [row for row in run["rows"] if row.get("section") == "forward" and row.get("S") == 32768]
            points = [(r["density"], r["ms"]) for r in rows if r.get("block") == "128x64" and r["op"] == "ours"]
            dense = [row["ms"] for row in rows if row["op"] == "cudnn dense"]
            if len(points) > 1 and dense:
                (low, first), (high, last) = min(points), max(points)
                slope = (last - first) / (high - low)
                return cls(first - slope * low, slope, dense[0])
        raise ValueError(f"{path} has no run of the forward with 128x64 blocks and a dense anchor.")

    def milliseconds(self, density: float, columns: float, plan: float, block_q: int = 128) -> float:
        """Of a call, with its share of planning.

        Args:
            density: kept share of the pairs.
            columns: further keys that every query reads, as a share of all keys.
            plan: dense attentions' worth of planning, per call.
        """
        slower = BLOCKS_OF_64 if block_q == 64 else 1.0
        return self.start + slower * self.whole * (density + columns) + plan * self.dense
