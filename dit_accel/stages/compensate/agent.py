"""Agent tokens between queries and keys: Agent Attention (arXiv 2312.08874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation, choose
from ...layout import TokenLayout
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ..order.simple import fold_tile, tile_order
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class Agents:
    """What one layout's agents are.

    Attributes:
        layout: of the sequence.
        tokens: int64 ``[agents, tokens of a tile]``, the latent tokens of each agent; tiles at an edge hold fewer, and
            token 0 fills them.
        share: float32, the same shape: of each token in its agent's mean, 0 of what fills.
    """

    layout: TokenLayout
    tokens: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True)
class AgentTokens(Compensation):
    """In place of the attention among latents, two small ones through agents: the mean queries of 3-D tiles.

    ``out = softmax(s**sharpen * Q A^T) [softmax(s * A K^T) V] + shortcut * V`` for the latents, with
    ``s = scale`` and A the agents; the agents read every visible key, text included. Other tokens than
    latents attend to all keys as before. Work grows with tokens times agents.

    Attributes:
        tile: latent tokens per agent and dimension (frames, height, width); an image folds it. More than two
            tokens in all, or the agents cost more than they save.
        sharpen: exponent of the scale in the second attention; below 1 it is sharper than usual.
        shortcut: weight of the values added to the output of their own tokens.
    """

    tile: tuple[int, int, int] = (2, 2, 2)
    sharpen: float = 0.3
    shortcut: float = 0.075

    def __post_init__(self) -> None:
        if len(self.tile) != 3 or min(self.tile) < 1 or self.tile[0] * self.tile[1] * self.tile[2] <= 2:
            raise ValueError(f"compensate.tile must hold three sizes and more than two tokens, got {self.tile}.")

    is_static: ClassVar[bool] = True
    attends_alone: ClassVar[bool] = True
    spans_references: ClassVar[bool] = False
    whole: ClassVar[str] = "has one softmax of every agent over single keys of the whole sequence"

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The two attentions, which torch's own kernels run."""
        return {"agents": choose("agents", backend, case, "there is no Triton kernel for it")}

    def prepare(
        self,
        blocks: SequenceBlocks,
        _mask: BlockMask,
        _call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> Agents:
        """Which agent stands for which tokens."""
        layout = blocks.layout
        tile = fold_tile(self.tile, layout.grid[0])
        order = tile_order(layout.grid, tile, blocks.device)
        tiles_h, tiles_w = (-(-size // step) for size, step in zip(layout.grid[1:], tile[1:], strict=True))
        _, height, width = layout.grid
        f, h, w = order // (height * width), order // width % height, order % width
        number = (f // tile[0] * tiles_h + h // tile[1]) * tiles_w + w // tile[2]
        # A tile's tokens follow each other in this order; so do tiles in their own.
        first = torch.searchsorted(number, number)
        place = torch.arange(len(order), device=order.device) - first
        tokens = order.new_zeros(int(number[-1]) + 1, tile[0] * tile[1] * tile[2])
        tokens[number, place] = order
        held = torch.zeros(tokens.shape, device=order.device)
        held[number, place] = 1
        return Agents(layout, tokens, held / held.sum(1, keepdim=True))

    def attend(self, call: AttentionCall, plan: AttentionPlan, _sparse: Sparse) -> Attended:
        """The two attentions through the agents; the kept blocks are not read."""
        agents: Agents = plan.compensation
        layout = agents.layout
        call.backend("agents")  # torch whatever its name: there is nothing to hand it to
        scale = call.scale
        visible = None if call.key_mask is None else call.key_mask[:, None, None]
        heads_first = [x.transpose(1, 2) for x in (call.q, call.k, call.v)]
        keys, values = heads_first[1:]
        first, last = layout.latent_start, layout.latent_start + layout.num_latent
        latent_q = heads_first[0][:, :, first:last]
        asked = _means(latent_q, agents)
        told = F.scaled_dot_product_attention(asked, keys, values, visible, scale=scale)
        latents = F.scaled_dot_product_attention(latent_q, asked, told, scale=scale**self.sharpen)
        out = latents + self.shortcut * values[:, :, first:last]
        if layout.num_extra:
            # Text and references keep their own attention: they are few.
            extra = torch.cat([heads_first[0][:, :, :first], heads_first[0][:, :, last:]], 2)
            others = F.scaled_dot_product_attention(extra, keys, values, visible, scale=scale)
            out = torch.cat([others[:, :, :first], out, others[:, :, first:]], 2)
        out = out.transpose(1, 2)
        return out, out

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Query-key products as a share of dense attention's."""
        agents: Agents = plan.compensation
        tokens, latents = agents.layout.seq_len, agents.layout.num_latent
        products = len(agents.tokens) * (tokens + latents) + agents.layout.num_extra * tokens
        # Filled in, not copied from the host: a captured step may ask.
        return torch.full((), products / tokens**2, device=agents.tokens.device)


def _means(latent_q: torch.Tensor, agents: Agents) -> torch.Tensor:
    """Mean query of every agent, ``[B, H, agents, D]`` from ``[B, H, num_latent, D]``; the same bits in every run."""
    gathered = latent_q[:, :, agents.tokens].float()
    return (gathered * agents.share[..., None]).sum(3).to(latent_q.dtype)
