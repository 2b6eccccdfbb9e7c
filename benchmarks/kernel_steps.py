"""Forms of a key step of the Hopper kernel, blocks of 128 x 64, half precision: a section of kernels.py.

What each is for, and what was predicted of it: ``notes/hopper_head_dim_64.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kernel_cases import DENSITIES, Report, checked, inputs, operations
from kernel_pairs import pair_mask

from dit_accel.kernels import BlockMask

# Two blocks a step are of head dim 64.
SINGLE: dict[str, object] = {"wide_steps": False}
FORMS: dict[str, dict[str, object]] = {
    "used": {},
    "turns": {"take_turns": True},
    "free": {"take_turns": False},
    "q shared": {"take_turns": True, "keep_q": False},
}
WIDE: dict[str, dict[str, object]] = {
    "wide, free": {"take_turns": False, "wide_steps": True, "keep_q": False, "stages": 4},
    "wide, turns": {"take_turns": True, "wide_steps": True, "keep_q": False, "stages": 4},
    "wide, turns, q kept": {"take_turns": True, "wide_steps": True, "keep_q": True, "stages": 4},
}


def section_steps(report: Report, args: argparse.Namespace) -> None:
    """All forms in turns; beside them blocks of 128 keys at the same density. At density 0.2 permuted rows too."""
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device=q.device).argsort(-1).to(torch.int32)
        for density in sorted(DENSITIES, reverse=True):
            mask = pair_mask(args.heads, length, 128, density, 0.0, q.device)
            labels = {"section": "steps", "S": length, "block": "128x64", "density": density, "dim": args.head_dim}
            compare(report, q, k, v, mask, None, labels)
            if density == 0.2:
                compare(report, q, k, v, mask, rows, {**labels, "tokens": "permuted"})


def compare(report: Report, q, k, v, mask: BlockMask, rows: torch.Tensor | None, labels: dict[str, object]) -> None:
    square = pair_mask(q.shape[2], q.shape[1], 128, float(labels["density"]), 0.0, q.device, block_k=128)
    forms = FORMS | (WIDE if q.shape[-1] == 64 else {})
    makers = {name: partial(hopper, q, k, v, mask, rows, **changes) for name, changes in forms.items()}
    makers |= {f"128x128, {name}": partial(hopper, q, k, v, square, rows, **FORMS[name]) for name in ("free", "turns")}

    def check(name: str, made: Callable[[], torch.Tensor]) -> dict[str, object]:
        return checked(q, k, v, square if "128x128" in name else mask, rows)(name, made)

    report.turns(makers, check, "used", operations(q, mask), **labels)


def hopper(q, k, v, mask: BlockMask, rows, **changes: object) -> Callable[[], torch.Tensor]:
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    config = default_config(mask.block_k, q.shape[-1], None, rows is not None)
    if changes:
        config = replace(config, **(SINGLE | changes))
    return lambda: hopper_forward(q, k, v, mask, rows, None, q.shape[-1] ** -0.5, config=config)[0]
