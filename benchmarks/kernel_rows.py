"""Permuted rows and token masks: a section of kernels.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from kernel_cases import (
    BLOCKS,
    DENSITIES,
    Report,
    checked,
    inputs,
    median_ms,
    operations,
    random_mask,
    with_token_bits,
)

from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.stages.order.simple import Tiles, tile_order

GRID = (16, 32, 64)  # of 32,768 latents; other lengths have no tile order here


def section_rows(report: Report, args: argparse.Namespace) -> None:
    """Permuted rows beside rows in order, at every length; with token bits and a key mask at density 0.2."""
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device=q.device).argsort(-1).to(torch.int32)
        for block_q, block_k in BLOCKS[:2]:
            for density in DENSITIES if length == args.lengths[0] else (0.05, 0.2):
                mask = random_mask(args.heads, length, block_q, block_k, density)
                labels = {"section": "rows", "S": length, "block": f"{block_q}x{block_k}", "density": density}
                permuted_rows(report, q, k, v, mask, rows, labels)
                if density == 0.2:
                    token_masks(report, q, k, v, with_token_bits(mask), rows, labels)


def tiled_rows(length: int, device: torch.device) -> torch.Tensor | None:
    """int32 ``[1, 1, S]``: the tile order that the presets use, where the length is that of the grid."""
    if length != GRID[0] * GRID[1] * GRID[2]:
        return None
    return tile_order(GRID, Tiles().shape, device).to(torch.int32)[None, None]


def permuted_rows(report: Report, q, k, v, mask: BlockMask, rows: torch.Tensor, labels: dict[str, object]) -> None:
    """Rows read in place, by a random and a tile order, and copied by torch; and in the portable kernel."""
    from dit_accel.kernels.attention.triton.forward import forward

    index = rows.long().transpose(1, 2)[..., None].expand_as(q)
    tiles = tiled_rows(q.shape[1], q.device)
    orders = {"in order": None, "permuted": rows}
    if tiles is not None:
        orders["permuted by tiles"] = tiles

    def copied() -> torch.Tensor:
        out = block_sparse_attention(*(x.gather(1, index) for x in (q, k, v)), mask)
        return torch.empty_like(out).scatter_(1, index, out)

    def check(name: str, call: Callable) -> dict[str, object]:
        return checked(q, k, v, mask, orders.get(name, rows))(name, call)

    makers = {name: in_place(q, k, v, mask, order) for name, order in orders.items()}
    makers["copied by torch"] = lambda: copied
    report.turns(makers, check, "in order", operations(q, mask), ["in order", "permuted"], **labels)
    # Not among the turns: it leaves the GPU so idle that the next one would run at a higher clock.
    portable = lambda: forward(q, k, v, mask, rows, None, q.shape[-1] ** -0.5)  # noqa: E731
    report.add(lambda: {"ms": median_ms(portable)}, **labels, op="portable kernel")


def token_masks(report: Report, q, k, v, mask: BlockMask, rows: torch.Tensor, labels: dict[str, object]) -> None:
    """Every block with token bits, and a tenth of the keys hidden by a key mask, in order and permuted."""
    key_mask = torch.rand(q.shape[:2], device=q.device) < 0.9
    orders = {"in order": None, "permuted": rows}

    def check(name: str, call: Callable) -> dict[str, object]:
        return checked(q, k, v, mask, orders[name], key_mask)(name, call)

    makers = {name: in_place(q, k, v, mask, order, key_mask) for name, order in orders.items()}
    labels = {**labels, "tokens": "token bits and key mask"}
    report.turns(makers, check, "in order", operations(q, mask), **labels)


def in_place(q, k, v, mask: BlockMask, rows=None, key_mask=None) -> Callable[[], Callable[[], torch.Tensor]]:
    """Makes a call that reads its rows where they are."""
    return lambda: lambda: block_sparse_attention(q, k, v, mask, rows=rows, key_mask=key_mask)
