"""What a reader must know of how a comparison was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .stages import device_of

_PACKAGES = ("dit-accel", "torch", "diffusers", "triton")


def describe(pipe: Any, arguments: Mapping[str, Any], steps: int, repeat: int, compiled: bool) -> dict[str, str]:
    """Device, versions, settings and procedure, as text.

    Args:
        steps: of the warm-up; 0 for none.
        repeat: timed runs of each clip.
        compiled: whether the pipeline is.
    """
    settings = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float, bool))}
    times = "once" if repeat == 1 else f"{repeat} times"
    turns = f"each clip {times} dense and {times} under each recipe, in turns; patched anew for every run"
    if compiled:
        turns += "; the pipeline is compiled, so as many untimed steps go before each of them"
    return {
        "device": _named(device_of(pipe)),
        "versions": ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)) is not None),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()) or "pipeline defaults",
        "warm-up": f"{steps} untimed steps of dense and of each recipe, at the same size" if steps else "none",
        "runs": turns,
    }


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
