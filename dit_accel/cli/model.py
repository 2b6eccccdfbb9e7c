"""The model that a command works on."""

from __future__ import annotations

import sys
from pathlib import Path
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
    from ..pipelines.loading import load

    # Its bar of loaded components is noise beside the commands' own; downloads keep theirs.
    disable_progress_bar()

    offered = builtins()
    name = model or next(iter(offered))
    builtin = offered.get(name)
    if not quiet:
        print(f"{name}: {builtin.description}" if builtin else f"Loading {name}", file=sys.stderr)
    return name, builtin, load(name, dtype=dtype, device=device)


def find_adapter(name_or_path: str, builtin: Builtin | None) -> Path:
    """The folder of an adapter: one that comes with a built-in model, or the user's own."""
    offered = {} if builtin is None else builtin.adapters
    if name_or_path in offered:
        return offered[name_or_path]
    folder = Path(name_or_path)
    if not folder.is_dir():
        known = f"the model's own are {', '.join(offered)}" if offered else "the model comes with none"
        raise ValueError(f"There is no adapter {name_or_path!r}: it is no folder, and {known}.")
    return folder
