"""What is known of the kernels on a GPU: whether they were run on one of its kind, or only compiled for it."""

from __future__ import annotations

import torch

from . import capability

# The tests for GPUs and all timings ran on these (H100 and H200).
RUN_ON = ("sm_90",)
# benchmarks/cards.py compiles the portable kernels for these too, and nobody ran them there.
COMPILED_FOR = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


def architecture(index: int) -> str:
    """As compilers call a GPU's, such as ``sm_89`` or ``gfx942``."""
    if capability.is_amd():
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = capability.compute_capability(index)
    return f"sm_{major}{minor}"


def support(device: torch.device) -> str:
    """A sentence on what was tested on a device like this."""
    if device.type != "cuda":
        return "tested: the torch backend"
    name = architecture(device.index or 0)
    if name in RUN_ON:
        return f"tested: the kernels were run on {name}"
    if name in COMPILED_FOR:
        return f"untested: the kernels compile for {name}, and were not run there"
    return f"untested: the kernels were neither compiled for {name} nor run there"
