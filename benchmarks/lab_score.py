"""The laboratory's loop over recorded calls: plans, outputs, errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from lab_cost import CostModel
from lab_selections import Found, Selection, keep_by, own_keys
from lab_stands import NEAR, Carried, Memory, Stand
from lab_sums import Estimate, Head, added
from recorded_calls import Recorded
from torch.nn.functional import pad

from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.layout import StepContext
from dit_accel.plan import SequenceBlocks
from dit_accel.run import Run
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.static import Window

WINDOW = "gna, whole blocks"
"""A window of all frames and 0.4 of height and width, as the preset has it, at its own density."""

HELD = 0.95
"""Attention mass whose density is reported."""

Key = tuple[str, float | None]
"""Name of a selection, density asked of it."""


Pair = tuple[list[float], list[float]]
"""Relative errors and masses of some calls."""


@dataclass
class Sums:
    """Over the calls of one row; of each layer and each step too."""

    error: float = 0.0
    norm: float = 0.0
    relative: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    layers: dict[int, Pair] = field(default_factory=lambda: defaultdict(lambda: ([], [])))
    steps: dict[int, Pair] = field(default_factory=lambda: defaultdict(lambda: ([], [])))


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search leaves to the later calls of its layer: knowledge of each head, plans ``[H, nq, nk]``, and by the
    name of a stand-in what these and it leave of each head's output."""

    step: int
    found: list[Found]
    keep: dict[Key, torch.Tensor]
    near: dict[Key, torch.Tensor]
    carried: dict[str, list[Carried]]


@dataclass(frozen=True, eq=False)
class Laboratory:
    """Rows to score, and how calls are cut into blocks.

    A short last block of queries takes no part; a short last block of keys does.

    Attributes:
        search_step: whose calls are searched; others are scored.
        num_steps: of the recorded run.
        every: query blocks of a call are a sample of every n-th.
        dtype: of the methods' sums; the reference is float64.
        at_once: query blocks that a search works on at a time: the sums of one query are as large as all values.
        concentrations: to which each call adds the density that holds :data:`HELD` of its exact mass.
    """

    selections: list[Selection]
    stands: list[Stand | Memory]
    densities: list[float]
    search_step: int
    num_steps: int
    tile: tuple[int, int, int]
    block: tuple[int, int]
    every: int
    device: torch.device
    dtype: torch.dtype
    with_window: bool = True
    at_once: int = 8
    concentrations: list[Concentration] = field(default_factory=list)

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
        every = self.all_blocks(call)
        effects = any(selection.effects for selection in self.selections)
        found = [
            Found.joined([Found.of(self.head(call, n, blocks), effects) for blocks in every.split(self.at_once)])
            for n in range(len(call.q))
        ]
        own = own_keys(self.head(call, 0, every))
        self.concentrations.append(Concentration.of(call, [one.mass for one in found]))
        keep: dict[Key, torch.Tensor] = {}
        near: dict[Key, torch.Tensor] = {}
        for selection in self.selections:
            if selection.searched is not None:
                scores = torch.stack([selection.searched(one) for one in found])
                keep |= self.plans(selection, scores, own, 1)
                near |= self.plans(selection, scores, own, NEAR)
        if self.with_window:
            keep[WINDOW, None] = near[WINDOW, None] = self.window(call)[:, : len(every)].expand(len(found), -1, -1)
        carried: dict[str, list[Carried]] = defaultdict(list)
        overs = list(dict.fromkeys(stand.over for stand in self.stands if isinstance(stand, Memory)))
        if overs:
            sample = self.sample(call)
            kept, close = (torch.stack(list(of.values()))[:, :, sample] for of in (keep, near))
            for n, one in enumerate(found):
                head = self.head(call, n, sample)
                plain = added(head.exact, kept[:, n])
                for over in overs:
                    out = self.output(over, one, head, kept[:, n], close[:, n], plain)
                    carried[over.name].append(Carried(head.out - out))
        return Searched(call.step, found, keep, near, carried)

    def score(self, call: Recorded, searched: Searched, sums: dict[tuple[Key, str], Sums]) -> None:
        """Add the errors of one call to those of its rows."""
        blocks = self.sample(call)
        heads = [self.head(call, n, blocks) for n in range(len(call.q))]
        own = own_keys(heads[0])
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
            k, v = k[: head.length], v[: head.length]
            exact = (q @ k.T * head.scale).softmax(-1) @ v
            norm += float(exact.square().sum())
            exact = exact.to(self.dtype)
            mass += (head.mass * kept[:, n]).sum((1, 2)).double().cpu() / (len(blocks) * len(heads))
            plain = added(head.exact, kept[:, n])
            outs: dict[str, torch.Tensor] = {}
            for s, stand in enumerate(self.stands):
                now = stand.over if isinstance(stand, Memory) else stand
                if now.name not in outs:
                    outs[now.name] = self.output(now, found, head, kept[:, n], close[:, n], plain)
                out = outs[now.name]
                if isinstance(stand, Memory):
                    age = (call.step - searched.step) / self.num_steps
                    out = stand.apply(searched.carried[now.name][n], out[:known], age)
                error[s, : len(out)] += (out - exact).square().sum((1, 2)).double().cpu()
                error[s, len(out) :] = math.nan
        self.concentrations.append(Concentration.of(call, [head.mass for head in heads]))
        density = kept.float().mean((1, 2, 3)).tolist()
        for (s, stand), (r, key) in ((a, b) for a in enumerate(self.stands) for b in enumerate(keep)):
            one = sums[key, stand.name]
            one.error += float(error[s, r])
            one.norm += norm
            one.relative.append(math.sqrt(float(error[s, r]) / norm))
            one.mass.append(float(mass[r]))
            for errors, masses in (one.layers[call.layer], one.steps[call.step]):
                errors.append(one.relative[-1])
                masses.append(one.mass[-1])
            one.density.append(density[r])

    def output(
        self, stand: Stand, found: Found, head: Head, kept: torch.Tensor, near: torch.Tensor, plain: Estimate
    ) -> torch.Tensor:
        """``[R, n, D]``: of plans ``[R, nq, nk]``, whose own weights and values are ``plain``, with a stand-in."""
        more = self.stood_in(stand, found, head, kept, near)
        if more is None:
            return plain[1] / plain[0][..., None]
        return (plain[1] + more[1]) / (plain[0] + more[0])[..., None]

    @staticmethod
    def stood_in(stand: Stand, found: Found, head: Head, kept: torch.Tensor, near: torch.Tensor) -> Estimate | None:
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

    def all_blocks(self, call: Recorded) -> torch.Tensor:
        """Whole blocks of queries."""
        return torch.arange(call.q.shape[1] // self.block[0], device=self.device)

    def sample(self, call: Recorded) -> torch.Tensor:
        """The blocks of queries that are scored."""
        return self.all_blocks(call)[self.every // 2 :: self.every]

    def head(self, call: Recorded, number: int, blocks: torch.Tensor) -> Head:
        """One head of a call in tile order, with some blocks of its queries."""
        rows, length = self.rows(call), call.q.shape[1]
        q, k, v = (x[number, rows].to(self.device, self.dtype) for x in (call.q, call.k, call.v))
        of_blocks = torch.arange(self.block[0], device=self.device) + blocks[:, None] * self.block[0]
        fill = -length % self.block[1]
        k, v = (pad(x, (0, 0, 0, fill)) for x in (k, v))
        return Head(q[of_blocks.flatten()], k, v, *self.block, blocks, length if fill else None)

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


@dataclass(frozen=True)
class Concentration:
    """The share of key blocks that hold :data:`HELD` of the exact mass of a row of blocks: the mean over rows.

    Attributes:
        heads: of each head.
    """

    layer: int
    step: int
    heads: list[float]

    @classmethod
    def of(cls, call: Recorded, masses: list[torch.Tensor]) -> Concentration:
        """Of ``[nq, nk]`` masses, one tensor a head."""
        return cls(call.layer, call.step, [density_that_holds(mass, HELD) for mass in masses])


def density_that_holds(mass: torch.Tensor, share: float) -> float:
    """Mean over rows ``[nq, nk]`` of the smallest share of blocks whose masses, of one in all, come to ``share``."""
    short = mass.double().sort(-1, descending=True).values.cumsum(-1) < share * (1 - 1e-9)
    return float(((short.sum(-1) + 1).double() / mass.shape[-1]).mean())


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
                "mean_error_of_layers": {layer: mean(errors) for layer, (errors, _) in one.layers.items()},
                "mass_of_layers": {layer: mean(masses) for layer, (_, masses) in one.layers.items()},
                "mean_error_of_steps": {step: mean(errors) for step, (errors, _) in one.steps.items()},
                "mass_of_steps": {step: mean(masses) for step, (_, masses) in one.steps.items()},
                "milliseconds": model.milliseconds(density, columns, plan_of[selection], laboratory.block[0]),
            }
        )
    return [row for row in rows if not math.isnan(row["error"])]
