"""The laboratory's loop over recorded calls: plans, outputs, errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from lab_cost import CostModel
from lab_selections import Found, Selection, keep_by, own_keys
from lab_stands import NEAR, Carried, Memory, Stand
from lab_sums import Head, added
from recorded_calls import Recorded

from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.layout import StepContext
from dit_accel.plan import SequenceBlocks
from dit_accel.run import Run
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.static import Window

WINDOW = "gna, whole blocks"
"""A window of all frames and 0.4 of height and width, as the preset has it, at its own density."""

Key = tuple[str, float | None]
"""Name of a selection, density asked of it."""


@dataclass
class Sums:
    """Over the calls of one row."""

    error: float = 0.0
    norm: float = 0.0
    relative: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    layers: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search leaves to the later calls of its layer: knowledge of each head, and plans ``[H, nq, nk]``."""

    found: list[Found]
    keep: dict[Key, torch.Tensor]
    near: dict[Key, torch.Tensor]
    carried: list[Carried]


@dataclass(frozen=True, eq=False)
class Laboratory:
    """Rows to score, and how calls are cut into blocks.

    Attributes:
        search_step: whose calls are searched; others are scored.
        every: query blocks of a call are a sample of every n-th.
        dtype: of the methods' sums; the reference is float64.
    """

    selections: list[Selection]
    stands: list[Stand | Memory]
    densities: list[float]
    search_step: int
    tile: tuple[int, int, int]
    block: tuple[int, int]
    every: int
    device: torch.device
    dtype: torch.dtype
    with_window: bool = True

    def run(self, calls: Iterable[Recorded], progress: Callable[[int], None]) -> dict[tuple[Key, str], Sums]:
        """The sums of all rows; ``progress`` is told how many calls were scored."""
        sums: dict[tuple[Key, str], Sums] = defaultdict(Sums)
        searches: dict[tuple[int, str, int], Searched] = {}
        scored = 0
        for call in calls:
            place = (call.prompt, call.branch, call.layer)
            if call.step == self.search_step:
                searches[place] = self.search(call)
            else:
                self.score(call, searches[place], sums)
                scored += 1
                progress(scored)
        return sums

    def search(self, call: Recorded) -> Searched:
        """All that a search of a call knows."""
        heads = self.heads(call, 1)
        found = [Found.of(head) for head in heads]
        own = own_keys(heads[0])
        keep: dict[Key, torch.Tensor] = {}
        near: dict[Key, torch.Tensor] = {}
        for selection in self.selections:
            if selection.searched is not None:
                scores = torch.stack([selection.searched(one) for one in found])
                keep |= self.plans(selection, scores, own, 1)
                near |= self.plans(selection, scores, own, NEAR)
        if self.with_window:
            keep[WINDOW, None] = near[WINDOW, None] = self.window(call).expand(len(heads), -1, -1)
        carried = []
        if any(isinstance(stand, Memory) for stand in self.stands):
            sample = self.heads(call, self.every)
            together = torch.stack(list(keep.values()))[:, :, sample[0].blocks]
            carried = [Carried.of(head, together[:, n]) for n, head in enumerate(sample)]
        return Searched(found, keep, near, carried)

    def score(self, call: Recorded, searched: Searched, sums: dict[tuple[Key, str], Sums]) -> None:
        """Add the errors of one call to those of its rows."""
        heads = self.heads(call, self.every)
        blocks, own = heads[0].blocks, own_keys(heads[0])
        keep, near = ({key: mask[:, blocks] for key, mask in of.items()} for of in (searched.keep, searched.near))
        known = len(keep)  # plans of searches, which come first
        for selection in self.selections:
            if selection.scores is not None:
                scores = torch.stack([selection.scores(*pair) for pair in zip(searched.found, heads)])
                keep |= self.plans(selection, scores, own, 1)
                near |= self.plans(selection, scores, own, NEAR)
        kept, close = torch.stack(list(keep.values())), torch.stack(list(near.values()))  # [R, H, nq, nk]
        error = torch.zeros(len(self.stands), len(keep), dtype=torch.float64)
        mass = torch.zeros(len(keep), dtype=torch.float64)
        norm = 0.0
        for n, (head, found) in enumerate(zip(heads, searched.found)):
            q, k, v = (x.double() for x in (head.q, head.k, head.v))
            exact = (q @ k.T * head.scale).softmax(-1) @ v
            norm += float(exact.square().sum())
            exact = exact.to(self.dtype)
            mass += (head.mass * kept[:, n]).sum((1, 2)).double().cpu() / (len(blocks) * len(heads))
            weight, value = added(head.exact, kept[:, n])
            for s, stand in enumerate(self.stands):
                if isinstance(stand, Memory):
                    out = stand.apply(searched.carried[n], (value / weight[..., None])[:known])
                else:
                    more = self.stood_in(stand, found, head, kept[:, n], close[:, n])
                    out = (value + more[1]) / (weight + more[0])[..., None] if more else value / weight[..., None]
                error[s, : len(out)] += (out - exact).square().sum((1, 2)).double().cpu()
                error[s, len(out) :] = math.nan
        density = kept.float().mean((1, 2, 3)).tolist()
        for (s, stand), (r, key) in ((a, b) for a in enumerate(self.stands) for b in enumerate(keep)):
            one = sums[key, stand.name]
            one.error += float(error[s, r])
            one.norm += norm
            one.relative.append(math.sqrt(float(error[s, r]) / norm))
            one.layers[call.layer].append(one.relative[-1])
            one.mass.append(float(mass[r]))
            one.density.append(density[r])

    @staticmethod
    def stood_in(
        stand: Stand, found: Found, head: Head, kept: torch.Tensor, near: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and values of the blocks ``[R, nq, nk]`` that are not kept; None where nothing stands in."""
        if stand.estimate is None:
            return None
        if stand.near is None:
            return added(stand.estimate(found, head), ~kept)
        far = added(stand.estimate(found, head), ~(kept | near))
        close = added(stand.near(found, head), near & ~kept)
        return far[0] + close[0], far[1] + close[1]

    def plans(
        self, selection: Selection, scores: torch.Tensor, own: torch.Tensor, times: int
    ) -> dict[Key, torch.Tensor]:
        """At every density, or so many times it."""
        return {
            (selection.name, density): keep_by(selection.budget, scores, min(1.0, times * density), own)
            for density in self.densities
        }

    def heads(self, call: Recorded, every: int) -> list[Head]:
        """The heads of a call in tile order, with every n-th block of queries."""
        rows = self.rows(call)
        q, k, v = (x[:, rows].to(self.device, self.dtype) for x in (call.q, call.k, call.v))
        blocks = torch.arange(every // 2, q.shape[1] // self.block[0], every, device=self.device)
        q = q.unflatten(1, (-1, self.block[0]))[:, blocks].flatten(1, 2)
        return [Head(*one, *self.block, blocks) for one in zip(q, k, v)]

    def rows(self, call: Recorded) -> torch.Tensor:
        """Tile order."""
        rows = Tiles(self.tile).rows(call.layout, torch.device("cpu"))
        assert rows is not None
        return rows.long()

    def window(self, call: Recorded) -> torch.Tensor:
        """bool ``[1, nq, nk]``: the blocks that :data:`WINDOW` reads."""
        select = Window(stride=(1, 4, 4), block=self.block, whole=True)
        blocks = SequenceBlocks(call.layout, self.rows(call), *self.block, torch.device("cpu"))
        inputs = AttentionInputs(*(x.transpose(0, 1)[None] for x in (call.q, call.k, call.v)))
        again = AttentionCall.of(call.layer, inputs, call.layout, StepContext(), Run())
        return select.select(blocks, select.prepare(blocks), again).to_dense()[0].to(self.device)


def rows_of(laboratory: Laboratory, sums: dict[tuple[Key, str], Sums]) -> list[dict[str, Any]]:
    """The figures of each row, with its time by the cost model."""
    model = CostModel.measured()
    plan_of = {selection.name: selection.plan for selection in laboratory.selections} | {WINDOW: 0.0}
    stand_of = {stand.name: stand for stand in laboratory.stands}
    rows = []
    for ((selection, asked), name), one in sums.items():
        density = sum(one.density) / len(one.density)
        stand = stand_of[name]
        columns = stand.columns if isinstance(stand, Memory) else stand.columns_at(density)
        rows.append(
            {
                "selection": selection,
                "stand": name,
                "asked_density": asked,
                "density": density,
                "mass": sum(one.mass) / len(one.mass),
                "error": math.sqrt(one.error / one.norm),
                "mean_error": sum(one.relative) / len(one.relative),
                "mean_error_of_layers": {layer: sum(found) / len(found) for layer, found in one.layers.items()},
                "milliseconds": model.milliseconds(density, columns, plan_of[selection], laboratory.block[0]),
            }
        )
    return [row for row in rows if not math.isnan(row["error"])]
