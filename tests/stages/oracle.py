"""Token masks of the selections, written from their definitions with loops and numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from dit_accel.layout import TokenLayout


def gna_visible(query: int, key: int, length: int, window: int, stride: int, dilation: int) -> bool:
    """One dimension of generalised neighbourhood attention (arXiv 2504.16922), token by token."""
    if query % dilation != key % dilation:
        return False
    members = list(range(query % dilation, length, dilation))
    i, j, last = members.index(query), members.index(key), len(members) - 1
    leader = min((i // stride) * stride + stride // 2, last)
    left, right = window // 2, window - 1 - window // 2
    start = max(leader - left, 0)
    if leader + right >= len(members):
        start = len(members) - window
    return start <= j < start + window


def window_tokens(
    layout: TokenLayout,
    window: tuple[int, ...],
    stride: tuple[int, ...] = (1, 1, 1),
    dilation: tuple[int, ...] = (1, 1, 1),
    sink_first_frame: bool = False,
) -> torch.Tensor:
    """bool ``[S, S]`` in the model's order: latents see their window, every other token sees and is seen."""
    frames, height, width = layout.grid
    places = list(itertools.product(range(frames), range(height), range(width)))
    tables = [
        [[gna_visible(q, k, n, w, s, d) for k in range(n)] for q in range(n)]
        for n, w, s, d in zip(layout.grid, window, stride, dilation, strict=True)
    ]
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    for i, q in enumerate(places):
        for j, k in enumerate(places):
            seen = all(tables[axis][q[axis]][k[axis]] for axis in range(3)) or (sink_first_frame and k[0] == 0)
            mask[layout.latent_start + i, layout.latent_start + j] = seen
    return mask


def pooled_tokens(
    layout: TokenLayout,
    rows: list[int],
    q: torch.Tensor,
    k: torch.Tensor,
    block: tuple[int, int],
    density: float | None,
    top_p: float | None,
    key_mask: torch.Tensor | None = None,
    sink_first_frame: bool = False,
) -> torch.Tensor:
    """bool ``[B, H, S, S]`` in the model's order, from (B, S, H, D) queries and keys, in float64."""
    batch, seq_len, heads, dim = q.shape
    block_q, block_k = block
    q_blocks = [rows[i : i + block_q] for i in range(0, seq_len, block_q)]
    k_blocks = [rows[j : j + block_k] for j in range(0, seq_len, block_k)]
    latent = range(layout.latent_start, layout.latent_start + layout.num_latent)
    per_frame = layout.grid[1] * layout.grid[2]

    def extra(tokens: list[int]) -> bool:
        return any(token not in latent for token in tokens)

    def first_frame(tokens: list[int]) -> bool:
        return any(token in latent and token - layout.latent_start < per_frame for token in tokens)

    mask = torch.zeros(batch, heads, seq_len, seq_len, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        visible = [True] * seq_len if key_mask is None else key_mask[b].tolist()
        q_np, k_np = q[b, :, h].double().numpy(), k[b, :, h].double().numpy()
        alive = [[token for token in tokens if visible[token]] for tokens in k_blocks]
        for i, q_tokens in enumerate(q_blocks):
            forced = [extra(tokens) or (sink_first_frame and first_frame(tokens)) for tokens in k_blocks]
            candidates = [j for j in range(len(k_blocks)) if not forced[j] and alive[j]]
            mean_q = q_np[q_tokens].mean(0)
            scores = {j: float(mean_q @ k_np[alive[j]].mean(0)) / math.sqrt(dim) for j in candidates}
            ranked = sorted(candidates, key=lambda j: (-scores[j], j))
            keep = {j for j in range(len(k_blocks)) if forced[j]}
            if density is not None:
                keep |= set(ranked[: max(1, math.ceil(density * len(candidates)))])
            if top_p is not None and ranked:
                weights = np.exp(np.array([scores[j] for j in ranked]) - scores[ranked[0]])
                mass = np.cumsum(weights / weights.sum())
                keep |= set(ranked[: int(np.searchsorted(mass, top_p)) + 1])
            keep |= {
                j for j in range(len(k_blocks)) if j * block_k < (i + 1) * block_q and (j + 1) * block_k > i * block_q
            }
            if extra(q_tokens):
                keep = set(range(len(k_blocks)))
            for j in keep:
                for token in alive[j]:
                    mask[b, h, q_tokens, token] = True
    return mask


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Dense masked attention of (B, S, H, D) in float64."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    logits = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)
