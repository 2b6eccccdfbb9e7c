"""Whether a backend runs on a device, asked of the very predicates that choose it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe

BLOCK = (128, 64)


def try_backend(name: str, dtype: torch.dtype, device: torch.device, recipe: Recipe | None = None) -> tuple[str, str]:
    """The backend of a plain call, or of one under a recipe, and why.

    What a call shows only when it comes, such as its head dim, is left to it.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend cannot run the call; the message says why.
    """
    import torch

    from ..kernels import BACKENDS, BlockMask
    from ..stages.order import Raster
    from ..stages.precision import ModelDtype

    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; known are {', '.join(BACKENDS)}.")
    block_q, block_k = getattr(recipe.select, "block", BLOCK) if recipe is not None else BLOCK
    q = torch.zeros(1, 128, 1, 128, dtype=dtype, device=device)
    blocks = torch.ones(1, 1, -(-128 // block_q), -(-128 // block_k), dtype=torch.bool, device=device)
    mask = BlockMask.from_dense(blocks, block_q=block_q, block_k=block_k, q_len=128, kv_len=128)
    permuted = recipe is not None and not isinstance(recipe.order, Raster)
    rows = torch.arange(128, dtype=torch.int32, device=device) if permuted else None
    precision = ModelDtype() if recipe is None else recipe.precision
    return precision.choose_backend(q, q, q, mask, rows, None, name)


def refuse_backend(name: str, dtype: torch.dtype, device: torch.device, recipe: Recipe | None) -> None:
    """Check a backend that was asked for by name, before the first step, also where nothing would run sparse.

    Raises:
        ValueError: unknown backend, or one that cannot run the recipe here.
    """
    if name == "auto":
        return
    try:
        try_backend(name, dtype, device, recipe)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
