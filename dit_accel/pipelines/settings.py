"""What a built-in model generates by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a model generates when the user names nothing: pixel size, frames (None: images), steps, guidance scale."""

    width: int
    height: int
    frames: int | None
    steps: int
    guidance: float
