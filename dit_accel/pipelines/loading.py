"""Load a pipeline: from the hub, from a folder, or built in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .builtin import builtin_named, builtins
from .dtypes import dtype_argument

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(name_or_path: str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """Load a diffusers pipeline.

    A built-in model can be called with a prompt alone: its size, frames, steps and guidance are its own.

    Args:
        name_or_path: a built-in model (:func:`~dit_accel.pipelines.builtin.builtins`), a folder that
            ``save_pretrained`` wrote, or an id on the model hub.
        dtype: of the weights; :func:`usual_dtype` of the device if None. A Wan autoencoder stays
            float32, as its authors advise.
        device: where to put it; None leaves it on the CPU.

    Raises:
        ValueError: no such model, one that is not installed, or the hub cannot be reached.
    """
    target = None if device is None else torch.device(device)
    if dtype is None:
        dtype = usual_dtype(target or torch.device("cpu"))
    builtin = builtin_named(name_or_path)
    pipe = _from_pretrained(name_or_path, dtype) if builtin is None else builtin.build(dtype)
    return pipe if target is None else pipe.to(target)


def usual_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast: GPUs, and CPUs with AMX tiles. Otherwise float32."""
    # torch has no public question for AMX.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if device.type != "cpu" or amx() else torch.float32


def _from_pretrained(name_or_path: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    from .call_defaults import KEY, WanPipeline

    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"The folder {name_or_path} holds no pipeline: it has no model_index.json.")
    elif not HUB_ID.fullmatch(name_or_path):
        raise ValueError(
            f"{name_or_path!r} is neither a built-in model ({', '.join(builtins())}), nor a folder, nor a hub "
            "id (owner/name)."
        )
    try:
        config = DiffusionPipeline.load_config(name_or_path)
        vae = (config.get("vae") or (None, None))[1]
        dtypes = {"default": dtype, "vae": torch.float32} if vae == "AutoencoderKLWan" else dtype
        # A built-in model that was saved brings its call's defaults.
        own = KEY in config and config.get("_class_name") == WanPipeline.__name__
        kind = WanPipeline if own else DiffusionPipeline
        return kind.from_pretrained(name_or_path, **dtype_argument(dtypes))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name_or_path!r} could not be loaded: {reason}") from error
