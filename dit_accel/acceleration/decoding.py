"""Settings of a pipeline's autoencoder that make decoding faster, or smaller in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..patches.install import replace_method
from .compiled import compile_module
from .frame_groups import decode_in_groups
from .kept import KeptTensors
from .stacked import StackedChange

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = ("tiled", "sliced", "channels_last", *DTYPES, "compiled")
# Those that have a number, as in "frames=8".
NUMBERED = ("frames", "tile")
_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})=([1-9]\d*)")
# By the rank of a convolution's weight.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# What an autoencoder has that can be set so. diffusers gives the methods to those, too, that have no such switch.
NEEDED = {
    "tiled": ("enable_tiling", "use_tiling"),
    "sliced": ("enable_slicing", "use_slicing"),
    "compiled": ("decoder",),
}
# How diffusers names what tiling and slicing set.
SWITCHES = ("use_", "tile_")


def set_vae(pipe: Any, settings: str | Sequence[str]) -> tuple[Callable[[], None], str]:
    """Change how a pipeline's autoencoder runs.

    Args:
        pipe: a pipeline with a ``vae``.
        settings: some of :data:`SETTINGS`, as a sequence or separated by commas. ``tiled`` and ``sliced`` take less
            memory and no less time; ``channels_last`` orders the convolutions' weights as their kernels read them;
            ``bf16`` and ``fp16`` change the dtype, except on a CPU that emulates it; ``compiled`` compiles the
            decoder; ``frames=N`` decodes N latent frames at once, where Wan's autoencoder takes one after another,
            and copies less; ``tile=N`` is ``tiled`` in tiles of N pixels a side, which overlap as the autoencoder's
            own do.

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
    for setting, needed in NEEDED.items():
        if setting in chosen and not all(hasattr(vae, name) for name in needed):
            raise ValueError(f"{type(vae).__name__} cannot be {setting}.")
    numbers = {found[1]: int(found[2]) for found in map(_NUMBERED.fullmatch, chosen) if found}
    strides = _strides(vae, numbers["tile"]) if "tile" in numbers else {}
    emulated = [name for name in chosen if name in DTYPES and _would_crawl(pipe, DTYPES[name])]
    chosen = tuple(name for name in chosen if name not in emulated)
    said = [", ".join(chosen)] if chosen else []
    said += [f"not {name}, which this CPU emulates and takes many times as long as float32" for name in emulated]
    put_on = partial(_put_on, vae, chosen, strides, numbers.get("frames"))
    return StackedChange(vae, put_on).undo, f"autoencoder: {'; '.join(said)}"


def _would_crawl(pipe: Any, dtype: torch.dtype) -> bool:
    """Whether an autoencoder would run in a dtype that it is not in and that its device emulates."""
    weight = next(pipe.vae.parameters())
    # An offloaded one lies on the CPU and runs elsewhere.
    device = torch.device(getattr(pipe, "_execution_device", weight.device))
    return bool(weight.dtype != dtype and device.type == "cpu" and emulates(dtype))


def emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no arithmetic of its own in a half precision: convolutions took 75 times as long."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    # A torch without oneDNN has neither the question nor the kernels.
    return not (hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)())


def _put_on(vae: Any, chosen: Sequence[str], strides: Mapping[str, int], frames: int | None) -> Callable[[], None]:
    """Change an autoencoder. Returns the undo."""
    with ExitStack() as undone:
        if frames is not None:
            undone.callback(decode_in_groups(vae, frames))
        before = _switches(vae)
        if "tiled" in chosen:
            vae.enable_tiling()
        if strides:
            vae.enable_tiling(**strides)
        if "sliced" in chosen:
            vae.enable_slicing()
        # Those alone: a user may have set others when this is undone.
        changed = {name: before[name] for name, value in _switches(vae).items() if before[name] != value}
        undone.callback(vars(vae).update, changed)
        kept = KeptTensors()
        undone.callback(kept.give_back)
        for name in DTYPES.keys() & chosen:
            _cast(vae, DTYPES[name], kept)
            for method in ("encode", "decode"):
                undone.callback(replace_method(vae, method, CastInput(vae, getattr(vae, method))))
        if "channels_last" in chosen:
            _order_channels_last(vae, kept)
        if "compiled" in chosen:
            undone.callback(compile_module(vae.decoder))
        return undone.pop_all().close


def _switches(vae: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if name.startswith(SWITCHES)}


class CastInput:
    """A method of an autoencoder whose first argument comes in whatever dtype the pipeline computes in.

    It becomes the dtype of the weights as they are then: a second cast may lie on top of this one.
    """

    def __init__(self, vae: nn.Module, method: Callable[..., Any]) -> None:
        self._vae = vae
        self._method = method

    def __call__(self, given: torch.Tensor, *args: Any, **options: Any) -> Any:
        from diffusers.models.modeling_utils import get_parameter_dtype

        return self._method(given.to(get_parameter_dtype(self._vae)), *args, **options)


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
