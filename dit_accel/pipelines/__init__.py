"""Pipelines to run: loaded, built in, or real architectures with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        # On first use, since it brings in torch.
        from .loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
