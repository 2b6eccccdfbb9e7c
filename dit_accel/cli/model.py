"""The model that a command works on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..pipelines.builtin import Builtin


def open_model(
    model: str | None, dtype: torch.dtype, device: torch.device, *, quiet: bool
) -> tuple[str, Builtin | None, Any]:
    """Name, built-in description if it is one, and pipeline; without a name the best built-in model."""
    from diffusers.utils.logging import disable_progress_bar

    from ..pipelines.builtin import builtins
    from ..pipelines.load import load

    # Its bar of loaded components is noise beside the commands' own; downloads keep theirs.
    disable_progress_bar()

    offered = builtins()
    name = model or next(iter(offered))
    builtin = offered.get(name)
    if not quiet:
        print(f"{name}: {builtin.description}" if builtin else f"Loading {name}", file=sys.stderr)
    return name, builtin, load(name, dtype=dtype, device=device)
