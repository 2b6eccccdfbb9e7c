"""Key blocks by a learned gate: SeerAttention, Sparsifiner, SEA, dynamic masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...call import AttentionCall
from ...kernels import BlockMask
from ...plan import LayerMemory, SequenceBlocks
from .gate_forms import FORMS, BlockPlaces, GateForm
from .pooled import candidates, keep_best
from .protocol import (
    WHOLE_BLOCK_SIZES,
    HeadDensities,
    Select,
    check_block,
    check_head_densities,
    check_share,
    density_of_layer,
    shares_per_head,
)


@dataclass(frozen=True)
class Learned(Select):
    """Score a pair of blocks by a gate that was trained to tell the exact attention mass.

    ``score = scale * mean(q) . mean(k)``, and what the form of the gate adds for each head
    (:mod:`~dit_accel.stages.select.gate_forms`), at the start nothing: an untrained gate chooses as
    :class:`~dit_accel.stages.select.pooled.Pooled` does. Train it with the objective "gate", which leaves the model as
    it is.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1].
        rank: of the projections, mixtures or features, a multiple of 6 for the three axes of the grid.
        form: "pooled", projections of pooled queries and keys that know where blocks lie (SeerAttention, arXiv
            2410.13276); "low_rank", a few mixtures of keys that know blocks to read (Sparsifiner, arXiv 2303.13755);
            "linear", the mass by linear attention (SEA, arXiv 2310.01777); "values", what the values of a block hold
            (dynamic mask attention, arXiv 2508.02124).
        block: tokens in a query and in a key block.
        head_densities: see :class:`~dit_accel.stages.select.pooled.Pooled`.
    """

    density: float | None = 0.1
    rank: int = 24
    block: tuple[int, int] = (128, 64)
    head_densities: HeadDensities = ()
    form: str = "pooled"
    has_density: ClassVar[bool] = True
    has_head_densities: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True
    of_call_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.density is None:
            raise ValueError("select.density must lie in (0, 1], got None.")
        check_share("density", self.density)
        check_block(self.block, WHOLE_BLOCK_SIZES)
        check_head_densities(self.head_densities)
        if self.form not in FORMS:
            raise ValueError(f"select.form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if self.rank < 6 or self.rank % 6:
            raise ValueError(f"select.rank must be a multiple of 6, got {self.rank}.")

    @property
    def goes_round(self) -> bool:  # type: ignore[override]
        """Where its form reads numbers of blocks, which can be gathered."""
        return FORMS[self.form].goes_round

    @property
    def needs_whole(self) -> str:  # type: ignore[override]
        """Names the form: others go round."""
        return f"with form={self.form!r}, unlike others of its forms, {Select.needs_whole}"

    def with_density(self, density: float) -> Learned:
        return replace(self, density=density, head_densities=())

    def of_layer(self, layer: int) -> Learned:
        densities = density_of_layer(self.head_densities, layer)
        return self if densities is self.head_densities else replace(self, head_densities=densities)

    def prepare(self, blocks: SequenceBlocks) -> BlockPlaces:
        return BlockPlaces(_places(blocks, blocks.block_q), _places(blocks, blocks.block_k))

    def build(self, heads: int, head_dim: int) -> GateForm:
        """The gate of one layer, which adds nothing yet."""
        return FORMS[self.form](heads, head_dim, self.rank)

    def select(
        self,
        blocks: SequenceBlocks,
        tables: BlockPlaces,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        scores = self.scores(blocks, tables, call)
        return keep_best(
            blocks,
            scores,
            call.key_mask,
            density=shares_per_head(self.head_densities, self.density, scores.shape[1], scores.device, call.heads),
            hidden=call.hidden_blocks,
            backend=call.backend("selection"),
        )

    def scores(self, blocks: SequenceBlocks, tables: BlockPlaces, call: AttentionCall) -> torch.Tensor:
        """Logits, float32 ``[B, H, nq, nk]``, with a gradient for the gate alone."""
        if call.router is None:
            raise RuntimeError("Learned has no gate here: it belongs to the layers of a patched model.")
        with torch.no_grad():
            gathered = FORMS[self.form].gathered(blocks, tables, call)
        return call.router(*gathered, scale=call.scale)

    def chosen_by(
        self, blocks: SequenceBlocks, scores: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What one call with these mean logits would keep."""
        return keep_best(blocks, scores, None, density=self.density, hidden=hidden).to_dense()


def gate_divergence(
    blocks: SequenceBlocks, tables: BlockPlaces, select: Learned, call: AttentionCall, mass: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of the gate's softmax from the exact mass, over the blocks that it may choose among;
    the mean over rows that choose, a 0-d tensor.

    Args:
        mass: exact attention mass of each block pair, ``[B, H, nq, nk]``.
    """
    scores = select.scores(blocks, tables, call)
    open_k = candidates(blocks, call.key_mask)[..., None, :]
    wanted = mass.float().masked_fill(~open_k, 0.0)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    told = scores.masked_fill(~open_k, torch.finfo(torch.float32).min).log_softmax(-1)
    rows = (torch.xlogy(wanted, wanted) - wanted * told).sum(-1)
    if blocks.forced_q is None:
        return rows.mean()
    choosing = (~blocks.forced_q).expand(rows.shape)
    return (rows * choosing).sum() / choosing.sum().clamp(min=1)


def _places(blocks: SequenceBlocks, block: int) -> torch.Tensor:
    latent = blocks.latent_of_slot >= 0
    short = -latent.shape[-1] % block
    count = F.pad(latent, (0, short)).unflatten(-1, (-1, block)).sum(-1).clamp(min=1)
    means = []
    for axis in blocks.coordinates:
        total = F.pad(axis * latent, (0, short)).unflatten(-1, (-1, block)).sum(-1)
        means.append(total / count)
    found = torch.stack(means, -1)
    return found.reshape((1,) * (3 - found.dim()) + tuple(found.shape)).float()
