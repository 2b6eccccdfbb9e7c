"""Faster diffusion transformers for video and images.

>>> import dit_accel
>>> handle = dit_accel.patch(pipe)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .acceleration.api import accelerate
    from .api import patch, unpatch
    from .attention_backend import register_backend
    from .calibration.calibrate import calibrate
    from .extending import register, unregister
    from .patches.artifact import CalibrationArtifact
    from .patches.families import Family, register_family
    from .patches.handle import PatchHandle
    from .recipe import Recipe
    from .runner import AttentionRunner
    from .training.adapter import load_adapter, save_adapter
    from .tuning.tune import tune

_HOME = {
    "AttentionRunner": "runner",
    "accelerate": "acceleration.api",
    "patch": "api",
    "unpatch": "api",
    "calibrate": "calibration.calibrate",
    "CalibrationArtifact": "patches.artifact",
    "Family": "patches.families",
    "PatchHandle": "patches.handle",
    "Recipe": "recipe",
    "register": "extending",
    "register_backend": "attention_backend",
    "register_family": "patches.families",
    "unregister": "extending",
    "load_adapter": "training.adapter",
    "save_adapter": "training.adapter",
    "tune": "tuning.tune",
}

__all__ = [
    "AttentionRunner",
    "CalibrationArtifact",
    "Family",
    "PatchHandle",
    "Recipe",
    "accelerate",
    "calibrate",
    "load_adapter",
    "patch",
    "presets",
    "register",
    "register_backend",
    "register_family",
    "save_adapter",
    "tune",
    "unpatch",
    "unregister",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line and documentation tools need no torch."""
    if name == "presets":
        return import_module(".presets", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
