"""Which axis order suits a head: the offline choice of PAROAttention (arXiv 2506.16054)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F

from ...kernels.common.scale import scale_of
from ...layout import TokenLayout
from .axes import AXIS_ORDERS, axis_order

LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class AxisScores:
    """How the attention of one layer's heads falls into tiles, per axis order.

    Attributes:
        sparse: float64 ``[H, 6]``, share of the tiles in which almost all probabilities are negligible; the
            more, the better for skipping tiles.
        incoherence: float64 ``[H, 6]``, mean over the tiles of largest over mean probability; the less, the
            better for quantising a tile with one scale.
    """

    sparse: torch.Tensor
    incoherence: torch.Tensor

    @classmethod
    def mean(cls, scores: Sequence[AxisScores]) -> AxisScores:
        """Average over prompts and denoising steps."""
        return cls(
            torch.stack([one.sparse for one in scores]).mean(0),
            torch.stack([one.incoherence for one in scores]).mean(0),
        )

    def combined(self, sparse_weight: float = 0.5) -> torch.Tensor:
        """Score ``[H, 6]`` to minimise: ``-a * sparse + (1 - a) * incoherence``, each divided by its sum.

        The paper adds both terms and minimises, which would prefer dense tiles; the sign here is corrected.
        It gives no value for the weight a.
        """
        if not 0.0 <= sparse_weight <= 1.0:
            raise ValueError(f"sparse_weight must lie in [0, 1], got {sparse_weight}.")
        tiny = torch.finfo(torch.float64).tiny
        sparse = self.sparse / self.sparse.sum(-1, keepdim=True).clamp_min(tiny)
        incoherence = self.incoherence / self.incoherence.sum(-1, keepdim=True).clamp_min(tiny)
        return -sparse_weight * sparse + (1.0 - sparse_weight) * incoherence

    def choose(self, sparse_weight: float = 0.5) -> tuple[str, ...]:
        """One of :data:`~dit_accel.stages.order.axes.AXIS_ORDERS` per head, for a layer of
        :class:`~dit_accel.stages.order.axes.AxisOrder`; the earlier one where two are equal."""
        return tuple(AXIS_ORDERS[n] for n in self.combined(sparse_weight).argmin(-1).tolist())


def measure_axes(
    layout: TokenLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    scale: float | None = None,
    tile: int = 64,
    negligible: float = 1e-3,
    share: float = 0.9,
) -> AxisScores:
    """Measure the six axis orders on one layer's call; seven times the work of dense attention, offline.

    Args:
        q, k: ``[B, S, H, D]``; the batch is averaged over.
        key_mask: bool ``[B, S]``, visible keys.
        pairs: bool ``[B|1, H|1, S, S]``, visible keys of each query, in place of ``key_mask``.
        scale: softmax scale, ``D ** -0.5`` if None.
        tile: tokens of a square tile; tiles at the end of the latents may be smaller.
        negligible: a probability below this is negligible.
        share: a tile is sparse when at least this share of its probabilities is negligible.
    """
    scale = scale_of(q, scale)
    latents = slice(layout.latent_start, layout.latent_start + layout.num_latent)
    queries = q[:, latents].transpose(1, 2).float() * scale
    keys = k.transpose(1, 2).float().transpose(-1, -2)
    hidden = None if key_mask is None else ~key_mask[:, None, None]
    if pairs is not None:
        hidden = ~pairs[:, :, latents]
    batch, heads = queries.shape[:2]
    rows = max(1, LOGITS_AT_ONCE // (batch * heads * layout.seq_len * tile)) * tile

    def logits(part: torch.Tensor, columns: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        found = part @ columns
        return found if mask is None else found.masked_fill(mask, -torch.inf)

    def parts(mask: torch.Tensor | None) -> Iterable[torch.Tensor | None]:
        return repeat(mask) if mask is None or mask.shape[2] == 1 else mask.split(rows, 2)

    pieces = zip(queries.split(rows, 2), parts(hidden), strict=False)
    lse = torch.cat([logits(part, keys, mask).logsumexp(-1) for part, mask in pieces], 2)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of a query that sees nothing
    sparse, incoherence = [], []
    for name in AXIS_ORDERS:
        order = axis_order(layout.grid, name, q.device)
        columns = keys[..., latents][..., order]
        of_order = None if hidden is None else hidden[..., latents][..., order]
        if pairs is not None and of_order is not None:
            of_order = of_order[:, :, order]
        in_order = zip(
            queries[:, :, order].split(rows, 2), lse[:, :, order].split(rows, 2), parts(of_order), strict=False
        )
        found = [
            _tile_figures(torch.exp(logits(part, columns, mask) - norm[..., None]), tile, negligible, share)
            for part, norm, mask in in_order
        ]
        sparse.append(torch.cat([figures[0] for figures in found], 2).mean((0, 2, 3)))
        incoherence.append(torch.cat([figures[1] for figures in found], 2).mean((0, 2, 3)))
    return AxisScores(torch.stack(sparse, -1), torch.stack(incoherence, -1))


def _tile_figures(prob: torch.Tensor, tile: int, negligible: float, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each tile is sparse, and its largest over mean probability: float64 ``[B, H, nq, nk]``."""
    pad = (0, -prob.shape[3] % tile, 0, -prob.shape[2] % tile)

    def tiles(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, pad).unflatten(3, (-1, tile)).unflatten(2, (-1, tile))

    size = tiles(torch.ones_like(prob[:1, :1])).sum((3, 5), dtype=torch.float64)
    small = tiles((prob < negligible).to(prob.dtype)).sum((3, 5), dtype=torch.float64)
    values = tiles(prob)
    mean = values.sum((3, 5), dtype=torch.float64) / size
    largest = values.amax((3, 5)).double()
    # A tile without any probability quantises without loss: as coherent as can be.
    ratio = torch.where(mean > 0, largest / mean.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return (small >= share * size).double(), ratio
