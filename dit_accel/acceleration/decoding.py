"""Settings of a pipeline's autoencoder that make decoding faster, or smaller in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..patches.install import replace_method
from .compiled import compile_module
from .frame_groups import decode_in_groups
from .kept import KeptTensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = ("tiled", "sliced", "channels_last", *DTYPES, "compiled")
# Those that have a number, as in "frames=8".
NUMBERED = ("frames", "tile")
_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})=([1-9]\d*)")
# By the rank of a convolution's weight.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# How diffusers names what tiling and slicing set.
SWITCHES = ("use_", "tile_")


def set_vae(pipe: Any, settings: str | Sequence[str]) -> tuple[Callable[[], None], str]:
    """Change how a pipeline's autoencoder runs.

    Args:
        pipe: a pipeline with a ``vae``.
        settings: some of :data:`SETTINGS`, as a sequence or separated by commas. ``tiled`` and ``sliced`` take less
            memory and no less time; ``channels_last`` orders the convolutions' weights as their kernels read them;
            ``bf16`` and ``fp16`` change the dtype; ``compiled`` compiles the decoder; ``frames=N`` decodes N latent
            frames at once, where Wan's autoencoder takes one after another, and copies less; ``tile=N`` is ``tiled``
            in tiles of N pixels a side, which overlap as the autoencoder's own do.

    Returns:
        The undo, after which weights and switches are the same to the bit, and a sentence for the summary.

    Raises:
        ValueError: an unknown setting, two dtypes, or a pipeline whose autoencoder has no such switch. Nothing has
            been touched then.
    """
    chosen = read_settings(settings)
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no autoencoder to set, got vae={','.join(chosen)!r}.")
    for setting, method in (("tiled", "enable_tiling"), ("sliced", "enable_slicing")):
        if setting in chosen and not hasattr(vae, method):
            raise ValueError(f"{type(vae).__name__} cannot be {setting}.")
    numbers = {found[1]: int(found[2]) for found in map(_NUMBERED.fullmatch, chosen) if found}
    strides = _strides(vae, numbers["tile"]) if "tile" in numbers else {}
    grouped = decode_in_groups(vae, numbers["frames"]) if "frames" in numbers else None
    switches = {name: value for name, value in vars(vae).items() if name.startswith(SWITCHES)}
    kept = KeptTensors()
    undone: list[Callable[[], None]] = [lambda: vars(vae).update(switches), kept.give_back]
    if grouped is not None:
        undone.append(grouped)
    if "tiled" in chosen:
        vae.enable_tiling()  # type: ignore[operator]
    if strides:
        vae.enable_tiling(**strides)  # type: ignore[operator]
    if "sliced" in chosen:
        vae.enable_slicing()  # type: ignore[operator]
    for name in chosen:
        if name in DTYPES:
            _cast(vae, DTYPES[name], kept)
            undone += [
                replace_method(vae, method, CastInput(getattr(vae, method), DTYPES[name]))
                for method in ("encode", "decode")
            ]
    if "channels_last" in chosen:
        _order_channels_last(vae, kept)
    if "compiled" in chosen:
        undone.append(compile_module(vae.decoder))  # type: ignore[arg-type]

    def undo() -> None:
        while undone:
            undone.pop()()

    return undo, f"autoencoder: {', '.join(chosen)}"


class CastInput:
    """A method of an autoencoder whose first argument comes in whatever dtype the pipeline computes in."""

    def __init__(self, method: Callable[..., Any], dtype: torch.dtype) -> None:
        self._method = method
        self._dtype = dtype

    def __call__(self, given: torch.Tensor, *args: Any, **options: Any) -> Any:
        return self._method(given.to(self._dtype), *args, **options)


def read_settings(settings: str | Sequence[str]) -> tuple[str, ...]:
    """The settings of a text or a sequence, in their usual order.

    Raises:
        ValueError: one is unknown, or there are two dtypes, or two numbers for a setting.
    """
    given = [name.strip() for name in (settings.split(",") if isinstance(settings, str) else settings)]
    numbered = sorted({name for name in given if _NUMBERED.fullmatch(name)})
    unknown = [name for name in given if name not in SETTINGS and name not in numbered]
    if unknown or not given:
        known = (*SETTINGS, *(f"{name}=N" for name in NUMBERED))
        raise ValueError(f"vae takes some of {', '.join(known)}, got {', '.join(unknown) or 'none'}.")
    if len(set(given) & set(DTYPES)) > 1:
        raise ValueError(f"vae takes one of {', '.join(DTYPES)}, got both.")
    if len({name.partition("=")[0] for name in numbered}) < len(numbered):
        raise ValueError(f"vae takes one number for each setting, got {', '.join(numbered)}.")
    return (*(name for name in SETTINGS if name in given), *numbered)


def _strides(vae: nn.Module, side: int) -> dict[str, int]:
    """Arguments of ``enable_tiling`` for square tiles of ``side`` pixels.

    Raises:
        ValueError: an autoencoder that has no such tiles, or tiles that are no more than their overlap.
    """
    ratio = int(getattr(vae, "spatial_compression_ratio", 0))
    found: dict[str, int] = {}
    for axis in ("height", "width"):
        least, stride = (getattr(vae, f"tile_sample_{name}_{axis}", None) for name in ("min", "stride"))
        if least is None or stride is None or not ratio:
            raise ValueError(f"{type(vae).__name__} has no tiles whose side can be set, got vae=tile={side}.")
        overlap = least - stride
        if side % ratio or side <= overlap:
            raise ValueError(
                f"vae takes tiles of a multiple of {ratio} pixels, more than their overlap of {overlap}, "
                f"got tile={side}."
            )
        found |= {f"tile_sample_min_{axis}": side, f"tile_sample_stride_{axis}": side - overlap}
    return found


def _cast(vae: nn.Module, dtype: torch.dtype, kept: KeptTensors) -> None:
    for tensor in (*vae.parameters(), *vae.buffers()):
        if tensor.is_floating_point():
            kept.replace(tensor, tensor.data.to(dtype))


def _order_channels_last(vae: nn.Module, kept: KeptTensors) -> None:
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            weight = module.weight
            kept.replace(weight, weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim]))
