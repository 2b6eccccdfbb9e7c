"""Block masks from the papers' equations, with loops and numpy in float64, independent of the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dit_accel.layout import TokenLayout
from dit_accel.plan import LayerMemory, SequenceBlocks
from tests.calls import call_of

LAYOUTS = {
    "alone": TokenLayout((3, 7, 9), 0, 189),
    "text first": TokenLayout((3, 7, 9), 13, 202),
    "text last": TokenLayout((3, 7, 9), 0, 204),
    "image": TokenLayout((1, 13, 15), 0, 195),
    "even": TokenLayout((2, 8, 8), 0, 128),
}
CPU = torch.device("cpu")


def inputs(layout: TokenLayout, heads: int = 3, batch: int = 2, dim: int = 16, seed: int = 0):
    """Queries and keys (B, S, H, D) whose heads differ in how concentrated their attention is."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.4, 3.0, heads)[:, None]
    q = torch.randn(batch, layout.seq_len, heads, dim, generator=generator) * sharpness
    k = torch.randn(batch, layout.seq_len, heads, dim, generator=generator) * 1.5 + 0.3
    return q, k


def half_hidden(layout: TokenLayout) -> torch.Tensor:
    """Key mask (2, S) that hides the last 11 tokens of the first sequence and one of the second."""
    key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
    key_mask[0, -11:] = False
    key_mask[1, 40] = False
    return key_mask


@dataclass
class View:
    """One batch item and head as the papers see it.

    Attributes:
        q, k: float64 ``[S, D]``.
        scale: of the softmax.
        q_blocks, k_blocks: tokens of each block, in the permuted order.
        alive: visible tokens of each key block.
        text_q, text_k: whether a block holds other tokens than latents.
        candidates: key blocks that are neither text nor empty.
        visible: bool ``[S]``.
        latent: bool ``[S]``.
        b, h: which one this is.
    """

    q: np.ndarray
    k: np.ndarray
    scale: float
    q_blocks: list[list[int]]
    k_blocks: list[list[int]]
    alive: list[list[int]]
    text_q: list[bool]
    text_k: list[bool]
    candidates: list[int]
    visible: np.ndarray
    latent: np.ndarray
    b: int
    h: int

    def own(self, i: int) -> set[int]:
        size_q, size_k = len(self.q_blocks[0]), len(self.k_blocks[0])
        return {
            j
            for j in range(len(self.k_blocks))
            if j * size_k < i * size_q + len(self.q_blocks[i]) and j * size_k + len(self.k_blocks[j]) > i * size_q
        }

    def complete(self, chosen: list[set[int]]) -> np.ndarray:
        """bool ``[nq, nk]``: the chosen candidates, own and text blocks; text queries read all."""
        keep = np.zeros((len(self.q_blocks), len(self.k_blocks)), bool)
        for i, picked in enumerate(chosen):
            for j in range(len(self.k_blocks)):
                keep[i, j] = bool(self.alive[j]) and (
                    j in picked or self.text_k[j] or self.text_q[i] or j in self.own(i)
                )
        return keep

    def probabilities(self, columns: np.ndarray | None = None) -> np.ndarray:
        """Softmax ``[S, S]`` over the visible keys, or over those of them in ``columns``."""
        shown = self.visible if columns is None else self.visible & columns
        logits = np.where(shown, self.scale * self.q @ self.k.T, -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def block_sums(self, tokens: np.ndarray) -> np.ndarray:
        """``[nq, nk]`` sums of a token matrix."""
        return np.array([[tokens[np.ix_(a, b)].sum() for b in self.k_blocks] for a in self.q_blocks])


def views(
    layout: TokenLayout,
    rows: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    block: tuple[int, int],
    key_mask: torch.Tensor | None,
) -> list[list[View]]:
    """Views ``[B][H]``."""
    batch, seq_len, heads, dim = q.shape
    latent = np.zeros(seq_len, bool)
    latent[layout.latent_start : layout.latent_start + layout.num_latent] = True
    slots = torch.arange(seq_len) if rows is None else rows
    of_batch = slots.expand(batch, heads, seq_len).tolist()
    out = []
    for b in range(batch):
        out.append([])
        orders = of_batch[b]
        for h in range(heads):
            visible = np.ones(seq_len, bool) if key_mask is None else key_mask[b].numpy()
            q_blocks = [orders[h][n : n + block[0]] for n in range(0, seq_len, block[0])]
            k_blocks = [orders[h][n : n + block[1]] for n in range(0, seq_len, block[1])]
            alive = [[token for token in tokens if visible[token]] for tokens in k_blocks]
            text_k = [not all(latent[tokens]) for tokens in k_blocks]
            out[b].append(
                View(
                    q=q[b, :, h].double().numpy(),
                    k=k[b, :, h].double().numpy(),
                    scale=1.0 / math.sqrt(dim),
                    q_blocks=q_blocks,
                    k_blocks=k_blocks,
                    alive=alive,
                    text_q=[not all(latent[tokens]) for tokens in q_blocks],
                    text_k=text_k,
                    candidates=[j for j in range(len(k_blocks)) if alive[j] and not text_k[j]],
                    visible=visible,
                    latent=latent,
                    b=b,
                    h=h,
                )
            )
    return out


def best(scores: dict[int, float], density: float) -> set[int]:
    """The ``ceil(density * n)`` best of n candidates, ties to the lower index; at least one."""
    count = max(1, math.ceil(density * len(scores) - 1e-9))
    return set(sorted(scores, key=lambda j: (-scores[j], j))[:count])


def fewest(scores: dict[int, float], top_p: float) -> set[int]:
    """The fewest best candidates whose softmax weights reach ``top_p``."""
    ranked = sorted(scores, key=lambda j: (-scores[j], j))
    if not ranked:
        return set()
    weights = np.exp(np.array([scores[j] for j in ranked]) - scores[ranked[0]])
    mass = np.cumsum(weights / weights.sum())
    return set(ranked[: int(np.searchsorted(mass, top_p)) + 1])


def per_head(choose: Callable[[View], list[set[int]]], grid: list[list[View]]) -> torch.Tensor:
    """bool ``[B, H, nq, nk]`` from a choice that looks at one head at a time."""
    return torch.tensor(np.array([[view.complete(choose(view)) for view in heads] for heads in grid]))


def selected(
    select,
    layout: TokenLayout,
    rows: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    memory: LayerMemory | None = None,
) -> torch.Tensor:
    """bool ``[B, H, nq, nk]`` of the package."""
    blocks = SequenceBlocks(layout, rows, *select.block, CPU)
    tables = select.prepare(blocks)
    mask = select.select(blocks, tables, call_of(q, k, key_mask=key_mask), memory).to_dense()
    return mask.expand(q.shape[0], q.shape[2], -1, -1)


def cases(*orders) -> list[tuple[str, object, bool]]:
    """(layout name, order, whether keys are hidden) for every layout, with and without a key mask."""
    return list(itertools.product(LAYOUTS, orders, (False, True)))
