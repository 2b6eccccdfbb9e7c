"""A backend that was asked for by name, before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe


def refuse_backend(name: str, dtype: torch.dtype, device: torch.device, recipe: Recipe) -> None:
    """Check a backend before the first step, also where nothing would run sparse.

    Raises:
        ValueError: unknown backend, or one that cannot run the recipe on this device.
    """
    if name == "auto":
        return
    from ..engine import Engine
    from ..kernels import BACKENDS
    from ..presets import automatic

    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; known are {', '.join(BACKENDS)}.")
    # A dense recipe has no operation to ask for.
    asked = automatic() if recipe.select.is_dense else recipe
    Engine(asked, [], name, 0).refuse_backend(device, dtype)
