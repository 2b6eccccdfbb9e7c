"""In what numbers the products are taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDtype:
    """The model's own dtype, with float32 accumulation."""


PRECISIONS: dict[str, type[ModelDtype]] = {"model": ModelDtype}
