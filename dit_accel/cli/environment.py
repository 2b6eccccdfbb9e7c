"""Where a number was measured: machine, device and versions, to stand beside it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("dit-accel", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "dit-accel":  # run from a source tree
                from .. import __version__

                found[name] = __version__
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of a device."""
    import torch

    if device.type != "cuda":
        return {
            "type": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def decisive(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of it what runs must share that are to be one result."""
    found = versions()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": describe_device(device)["name"],
        "versions": {name: found.get(name) for name in ("dit-accel", "torch", "diffusers")},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "device": describe_device(device),
        "platform": platform.platform(terse=True),
        "versions": versions(),
    }
