"""Where a model's forward runs, which under offloading is not where its parameters are."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(model: nn.Module) -> torch.device:
    """The device of a model's forward: that of its offloading, else of its parameters; the CPU without any.

    accelerate's hooks (model and sequential offload, device maps) and diffusers' group offload say where they bring a
    module to. Where several do, the first module's counts.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a chain of hooks, or one
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        registry = getattr(module, "_diffusers_hook", None)
        group = None if registry is None else registry.get_hook("group_offloading")
        if group is not None:
            return torch.device(group.config.onload_device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
