"""The symbols of diffusers' modules through which a patch is reached."""

from __future__ import annotations

import sys

import torch.nn.functional
from diffusers.models import attention_dispatch

OWN = {"dispatch_attention_fn": attention_dispatch.dispatch_attention_fn, "F": torch.nn.functional}


def replaced_symbols() -> dict[tuple[str, str], int]:
    """Those that are not diffusers' own, by module and name; modules that are imported meanwhile add none."""
    return {
        (name, symbol): id(vars(module)[symbol])
        for name, module in list(sys.modules.items())
        if name.startswith("diffusers.models")
        for symbol, own in OWN.items()
        if vars(module).get(symbol, own) is not own
    }
