"""A plug-in of vllm-omni, which calls :func:`register` in each of its processes (entry point ``dit_accel``)."""

from __future__ import annotations

import os

# Names the backend of vllm-omni whose place is taken; vllm-omni has no free one.
REPLACES = "DIT_ACCEL_VLLM_OMNI"


def register() -> None:
    """Take the place of the diffusion attention backend that ``DIT_ACCEL_VLLM_OMNI`` names; without it do nothing.

    vllm-omni calls every plug-in that is installed, in each of its processes and perhaps twice, so that what nobody
    asked for must not happen here, and a second call must change nothing.

    Raises:
        ValueError: vllm-omni has no backend of that name.
    """
    replaced = os.environ.get(REPLACES)
    if not replaced:
        return
    from vllm_omni.diffusion.attention.backends import registry

    names = list(registry.DiffusionAttentionBackendEnum.__members__)
    if replaced not in names:
        raise ValueError(f"{REPLACES} must name a backend of vllm-omni ({', '.join(names)}), got {replaced!r}.")
    member = registry.DiffusionAttentionBackendEnum.__members__[replaced]
    registry.register_diffusion_backend(member, f"{__name__}.backend.SparseBackend")
