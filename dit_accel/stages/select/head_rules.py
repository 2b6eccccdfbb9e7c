"""Static patterns of each head, as rules of the grid: MoA, DuoAttention, S2-Attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...plan import LayerMemory, SequenceBlocks
from .block_places import DIMENSIONS, blocks_of_cell, nearest_blocks
from .pooled import keep_chosen
from .protocol import WHOLE_BLOCK_SIZES, Select, check_block
from .static import Window
from .token_tables import seen_blocks, separable

Rules = tuple[tuple[str, ...], ...]
"""A rule per layer, and in it per head; a single layer's entry serves all layers, a single head's all heads."""

SINK = "sink"
RULES = (
    "full",
    *(f"near {share} fhw" for share in (0.0625, 0.125, 0.25, 0.5)),
    *(f"near {share} hw" for share in (0.125, 0.25, 0.5)),
    *(f"near {share} f" for share in (0.25, 0.5)),
    *(f"near {share} h" for share in (0.125, 0.25, 0.5)),
    *(f"near {share} w" for share in (0.125, 0.25, 0.5)),
    "cells 1 2 2",
    "cells 2 2 2",
    "strided 4",
    "strided 8",
)
"""What a search chooses among: everything; the blocks nearest in space and time, in space, and in time; bands of rows
and of columns; cells, shifted by half in every other head; shards of every fourth and eighth block."""


@dataclass(frozen=True, eq=False)
class RuleTables:
    """The blocks that rules keep on one layout, worked out when they are asked for."""

    blocks: SequenceBlocks
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep(self, rule: str, head: int, place: int) -> torch.Tensor:
        """bool ``[nq, nk]`` of a head of the layer, at a place among those that the blocks are of, under a rule."""
        kind, *values = rule.split()
        if kind == "strided":
            shard = head % int(values[0])
            return self._get(f"{rule} {shard}", lambda: _shard(self.blocks, int(values[0]), shard))
        if kind == "cells":
            shifted = head % 2 == 1
            found = self._get(f"{rule} {shifted}", lambda: blocks_of_cell(self.blocks, _cells(values), shifted))
            return found[place if found.shape[0] > 1 else 0]
        kept = self._get(rule, lambda: _of_grid(self.blocks, rule))
        return kept[place if kept.shape[0] > 1 else 0] if kept.dim() == 3 else kept

    def _get(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]


@dataclass(frozen=True)
class HeadRules(Select):
    """A static pattern for each head, whole blocks by rules of the grid (MoA, DuoAttention, S2-Attention).

    Nothing is planned from queries and keys, and rules are of the grid, so that what was found at one size serves
    another. The rules are

    - ``full``,
    - ``near SHARE DIMENSIONS``: that share of the key blocks, those nearest in some dimensions of "fhw" (frames,
      height, width), in shares of the grid: "near 0.25 hw" is a column through all frames, "near 0.25 h" a band of
      rows; as many blocks at every size,
    - ``window F H W``: a neighbourhood as :class:`~dit_accel.stages.select.static.Window` has it, in tokens (ints) or
      shares of the dimension (floats), so also bands of rows or columns and frames near in time; with ``sink`` behind
      it the first frame too; a block is kept if any of its token pairs is seen, so more of a small grid than of a
      large one,
    - ``cells F H W``: the blocks of the same cell, of so many cells to each dimension, in every other head shifted by
      half a cell (the shifted halves of LongLoRA and SinkLoRA),
    - ``strided N``: every Nth block of keys in their order, another for each head; N heads together read all.

    A block always reads itself, and text is always read. :func:`~dit_accel.calibration.patterns.search_rules` finds a
    rule for each head by its measured error.

    Attributes:
        rules: per layer and head.
        block: tokens in a query and in a key block.
    """

    rules: Rules = (("window 1.0 0.5 0.5",),)
    block: tuple[int, int] = (128, 64)
    is_static: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_block(self.block, WHOLE_BLOCK_SIZES)
        if not self.rules or not all(self.rules):
            raise ValueError(f"select.rules must hold a rule for some head of some layer, got {self.rules}.")
        for rule in {rule for layer in self.rules for rule in layer}:
            check_rule(rule)

    def of_layer(self, layer: int) -> HeadRules:
        if len(self.rules) == 1:
            return self
        if layer >= len(self.rules):
            raise ValueError(f"select.rules names {len(self.rules)} layers, the model has a layer {layer}.")
        return replace(self, rules=(self.rules[layer],))

    def prepare(self, blocks: SequenceBlocks) -> RuleTables:
        return RuleTables(blocks)

    def select(
        self,
        blocks: SequenceBlocks,
        tables: RuleTables,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one layer, ``[1, H, nq, nk]``, or with a batch where a key mask hides keys."""
        rules = self.of_layer(call.layer).rules[0]
        total = call.q.shape[2] if call.heads is None else call.heads.total
        if len(rules) not in (1, total):
            raise ValueError(f"select.rules are for {len(rules)} heads, the layer has {total}.")
        first, number = (0, total) if call.heads is None else (call.heads.first, call.heads.number)
        kept = [
            tables.keep(rules[head if len(rules) > 1 else 0], head, head - first)
            for head in range(first, first + number)
        ]
        return keep_chosen(blocks, torch.stack(kept)[None], call.key_mask, call.backend("selection"))


def check_rule(rule: str) -> None:
    """Raise unless a rule is one of those of :class:`HeadRules`."""
    kind, *values = rule.split() or [""]
    try:
        if kind == "full" and not values:
            return
        if kind == "strided" and len(values) == 1 and int(values[0]) >= 1:
            return
        if kind == "cells" and min(_cells(values)) >= 1:
            return
        if kind == "near" and _is_near(*values):
            return
        if kind == "window" and (len(values) == 3 or values[3:] == [SINK]):
            window_of(rule)
            return
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"select.rules must be 'full', 'near SHARE DIMENSIONS' (such as 'near 0.25 hw'), 'window F H W' with three "
        f"sizes (tokens, or shares such as 0.25) and perhaps 'sink', 'cells F H W' or 'strided N', got {rule!r}."
    )


def window_of(rule: str) -> Window:
    """The neighbourhood that a rule of that kind names."""
    sizes = [float(value) if "." in value else int(value) for value in rule.split()[1:4]]
    return Window(window=(sizes[0], sizes[1], sizes[2]), sink_first_frame=rule.endswith(SINK))


def _of_grid(blocks: SequenceBlocks, rule: str) -> torch.Tensor:
    kind, *values = rule.split()
    if kind == "full":
        return torch.ones(blocks.num_blocks, dtype=torch.bool, device=blocks.device)
    if kind == "near":
        return nearest_blocks(blocks, float(values[0]), values[1])
    window = window_of(rule)
    visible = [table.to(blocks.device) for table in window.visibility(blocks.layout.grid)]
    return seen_blocks(blocks, separable(visible), window.sink_first_frame)


def _is_near(share: str, counted: str) -> bool:
    return 0.0 < float(share) <= 1.0 and len(set(counted)) == len(counted) > 0 and set(counted) <= set(DIMENSIONS)


def _cells(values: list[str]) -> tuple[int, int, int]:
    frames, height, width = map(int, values)
    return frames, height, width


def _shard(blocks: SequenceBlocks, stride: int, shard: int) -> torch.Tensor:
    keys = torch.arange(blocks.num_blocks[1], device=blocks.device) % stride == shard
    return keys.expand(blocks.num_blocks[0], -1)
