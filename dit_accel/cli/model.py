"""The model that a command works on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..pipelines.builtin import Builtin


def choose_model(model: str | None) -> tuple[str, Builtin | None]:
    """Name, and built-in description if it is one; without a name the best built-in model. Nothing is loaded.

    Raises:
        ValueError: a built-in model whose weights are not installed.
    """
    from ..pipelines.builtin import builtin_named
    from ..pipelines.companion import NAMES

    name = NAMES[0] if model is None else model
    return name, builtin_named(name)


def will_make_video(name: str, builtin: Builtin | None) -> bool | None:
    """Whether a model makes videos, else images, from its index alone; None where that does not tell."""
    if builtin is not None:
        return builtin.settings.frames is not None
    import diffusers

    from ..pipelines.generate import makes_video

    try:
        index = diffusers.DiffusionPipeline.load_config(name)
    except (OSError, ValueError):
        return None  # loading it will say what is wrong
    kind = getattr(diffusers, str(index.get("_class_name")), None) if isinstance(index, dict) else None
    is_pipeline = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    return makes_video(kind) if is_pipeline else None


def open_model(
    model: str | None, dtype: torch.dtype, device: torch.device, *, quiet: bool
) -> tuple[str, Builtin | None, Any]:
    """Name, built-in description if it is one, and pipeline; without a name the best built-in model.

    Raises:
        ValueError: there is no such model, or its files are damaged.
    """
    from diffusers.utils.logging import disable_progress_bar
    from safetensors import SafetensorError

    from ..pipelines.loading import load

    # Its bar of loaded components is noise beside the commands' own; downloads keep theirs.
    disable_progress_bar()

    name, builtin = choose_model(model)
    if not quiet:
        print(f"{name}: {builtin.description}" if builtin else f"Loading {name}", file=sys.stderr)
    try:
        return name, builtin, load(name, dtype=dtype, device=device)
    except (SafetensorError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"{name!r} could not be loaded, its files may be damaged: {reason}.") from error
