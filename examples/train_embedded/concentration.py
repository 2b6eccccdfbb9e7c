"""A small penalty that keeps the heads of the embedded model from looking everywhere at once.

Large video models concentrate their attention as they train for weeks; a network of a few minutes keeps many
heads close to uniform, and then says nothing about sparse attention. The penalty asks of every head that the
effective share of key tiles it reads, exp(entropy of its tile masses) / tiles, is at most `SHARE`. It acts on
one layer a step, on a few samples and query tiles, and reaches that layer's query and key weights only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan

from dit_accel.stages.order import tile_order

TILE = 4
SHARE = 0.3


@contextmanager
def recorded_attention(calls: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Wan's attentions record (query, key) [n, tokens, heads, head_dim] and return their values instead."""

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append((query, key))
        return value

    original = transformer_wan.dispatch_attention_fn
    transformer_wan.dispatch_attention_fn = record
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = original


def attention_inputs(
    transformer: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of one layer's self-attention, with a gradient to that layer only."""
    with torch.no_grad():
        rotary = transformer.rope(latents)
        hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
        _, modulation, text, _ = transformer.condition_embedder(timestep, text, None)
        modulation = modulation.unflatten(1, (6, -1))
        for block in transformer.blocks[:layer]:
            hidden = block.forward(hidden, text, modulation, rotary)  # not through a compiled call
    block = transformer.blocks[layer]
    shift, scale = (block.scale_shift_table + modulation.float()).chunk(6, dim=1)[:2]
    x = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    with recorded_attention(calls):
        block.attn1(x, None, None, rotary)
    return calls[0]


def tile_masses(query: torch.Tensor, key: torch.Tensor, grid: tuple[int, int, int], tiles: list[int]) -> torch.Tensor:
    """Attention mass of every key tile of 4 x 4 x 4 tokens, mean over the queries of each asked tile.

    Args:
        query, key: [n, tokens, heads, head_dim] in raster order of `grid`, whose sides are multiples of 4.
        tiles: indices of the query tiles.

    Returns:
        [n, heads, len(tiles), all tiles]; rows sum to one.
    """
    n, _, heads, dim = key.shape
    order = tile_order(grid, (TILE, TILE, TILE), key.device).view(-1, TILE**3)
    q = query[:, order[tiles].flatten()].transpose(1, 2)
    k = key[:, order.flatten()].transpose(1, 2)
    weights = torch.softmax((q @ k.mT).float() * dim**-0.5, dim=-1)
    return weights.view(n, heads, len(tiles), TILE**3, -1, TILE**3).sum(-1).mean(3)


def concentration_penalty(masses: torch.Tensor, share: float = SHARE) -> torch.Tensor:
    """Mean excess of the entropy, in units of log(tiles), over that of a head which reads `share` of the tiles."""
    tiles = masses.shape[-1]
    entropy = -(masses * masses.clamp_min(1e-9).log()).sum(-1) / math.log(tiles)
    return (entropy - math.log(share * tiles) / math.log(tiles)).clamp_min(0).mean()
