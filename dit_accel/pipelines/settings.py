"""What a built-in model generates by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a model generates when the user names nothing: pixel size, frames, steps, guidance scale."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
