"""A small penalty that keeps the heads of the embedded model from looking everywhere at once.

Large video models concentrate their attention as they train for weeks; a network of a few minutes keeps many
heads close to uniform, and then says nothing about sparse attention. The penalty asks of every head and query
tile that its best key tiles, a given share of all, hold 95 % of the attention mass: what a sparse method that
chooses blocks needs. It acts on a few samples and query tiles, on all layers, and changes only how each layer makes
its queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan

from dit_accel.stages.order.simple import tile_order

TILE = 4
KEPT = 0.95


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
    transformer: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Query and key of one self-attention after another, each with a gradient to its own layer only."""
    with torch.no_grad():
        rotary = transformer.rope(latents)
        hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
        _, modulation, text, _ = transformer.condition_embedder(timestep, text, None)
        modulation = modulation.unflatten(1, (6, -1))
    for block in transformer.blocks:
        shift, scale = (block.scale_shift_table + modulation.float()).chunk(6, dim=1)[:2]
        x = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        with recorded_attention(calls):
            block.attn1(x, None, None, rotary)
        yield calls[0]
        with torch.no_grad():
            hidden = block.forward(hidden, text, modulation, rotary)  # not through a compiled call


def tile_tokens(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """[tiles, 64]: the tokens of every tile of 4 x 4 x 4, in a grid whose sides are multiples of 4."""
    return tile_order(grid, (TILE, TILE, TILE), device).view(-1, TILE**3)


def tile_masses(query: torch.Tensor, key: torch.Tensor, order: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Attention mass of every key tile of 4 x 4 x 4 tokens, mean over the queries of each asked tile.

    Args:
        query, key: [n, tokens, heads, head_dim] in raster order.
        order: `tile_tokens` of their grid.
        tiles: indices of the query tiles.

    Returns:
        [n, heads, len(tiles), all tiles]; rows sum to one.
    """
    n, _, heads, dim = key.shape
    q = query[:, order[tiles].flatten()].transpose(1, 2)
    k = key[:, order.flatten()].transpose(1, 2)
    weights = torch.softmax((q @ k.mT).float() * dim**-0.5, dim=-1)
    return weights.view(n, heads, len(tiles), TILE**3, -1, TILE**3).sum(-1).mean(3)


def concentration_penalty(masses: torch.Tensor, share: float) -> torch.Tensor:
    """By how much, in nats, the best `share` of the key tiles falls short of 95 % of the mass: mean of all rows.

    The logarithm keeps the gradient alive in a head that is still close to uniform.
    """
    best = max(1, round(share * masses.shape[-1]))
    kept = masses.topk(best, dim=-1).values.sum(-1)
    return (math.log(KEPT) - kept.clamp_min(1e-6).log()).clamp_min(0).mean()


def density(masses: torch.Tensor) -> torch.Tensor:
    """The share of key tiles that holds 95 % of the mass: mean of all rows."""
    ordered = masses.sort(dim=-1, descending=True).values.cumsum(-1)
    return ((ordered < KEPT).sum(-1) + 1).clamp_max(masses.shape[-1]).float().mean() / masses.shape[-1]


def annealed_share(first: float, last: float, done: float) -> float:
    """From `first` to `last` in equal ratios over the first 60 % of the training, then `last`."""
    return first * (last / first) ** min(1.0, done / 0.6)
