"""The one call for a whole run: attention, linear layers, compilation and the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..api import patch
from ..patches.graphs.install import install_graphs
from ..patches.handle import PatchHandle
from ..recipe import Recipe
from .compiled import compile_blocks
from .decoding import set_vae
from .linears import quantize_linears


def accelerate(
    pipe: Any,
    recipe: Recipe | str | None = None,
    *,
    compile: bool = False,
    graphs: bool = False,
    linear: str | None = None,
    vae: str | Sequence[str] | None = None,
    **options: Any,
) -> PatchHandle:
    """Patch a pipeline, and speed up what is left of a run beside attention.

    Args:
        pipe: a diffusers pipeline.
        recipe: of attention, as :func:`~dit_accel.patch` takes it.
        compile: torch.compile of the transformers' repeated blocks.
        graphs: replay blocks as CUDA graphs while their plans stay, which spares the host's time of a step
            (:mod:`dit_accel.patches.graphs`). Where a block cannot be replayed it runs as before, and the summary says
            why.
        linear: ``"fp8"`` or ``"int8"`` for the blocks' linear layers, through torchao; None leaves them as they are.
        vae: how the autoencoder runs: some of ``tiled``, ``sliced``, ``channels_last``, ``bf16``, ``fp16``,
            ``compiled``, ``frames=N`` and ``tile=N``, separated by commas
            (:func:`~dit_accel.acceleration.decoding.set_vae`). None leaves it as it is.
        options: further ones of :func:`~dit_accel.patch`, such as ``density`` or ``backend``.

    Returns:
        The patch's handle. ``remove()`` undoes all of it, ``summary()`` says all of it.

    Raises:
        ValueError: as :func:`~dit_accel.patch`; a setting that is unknown, or that this pipeline, this device or what
            is installed cannot have. Nothing has been touched then.
    """
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "components"):
        raise ValueError(f"accelerate takes a diffusers pipeline, got {type(pipe).__name__}; patch takes a model.")
    handle = patch(pipe, recipe, **options)
    try:
        change_beside_attention(handle, compile=compile, graphs=graphs, linear=linear, vae=vae)
    except BaseException:
        handle.remove()
        raise
    return handle


def change_beside_attention(
    handle: PatchHandle,
    *,
    compile: bool = False,
    graphs: bool = False,
    linear: str | None = None,
    vae: str | Sequence[str] | None = None,
) -> None:
    """Do the same to a pipeline that is patched already, for instance with an adapter; its handle undoes it.

    Raises:
        ValueError: as :func:`accelerate`. What was done before stays, for the handle to undo.
    """
    if vae is not None:
        handle.record_change(*set_vae(handle.target, vae))
    if linear is not None:
        handle.record_change(*quantize_linears(handle.target, linear))
    if compile:
        handle.record_change(compile_blocks(handle.target), "transformer blocks: compiled")
    if graphs:  # of compiled code, where it is compiled
        handle.record_change(install_graphs(handle), "transformer blocks: replayed as CUDA graphs while plans stay")
