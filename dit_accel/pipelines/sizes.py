"""Which sizes and numbers of frames a pipeline can make, known before it runs."""

from __future__ import annotations

from math import lcm
from typing import Any

from ..patches.families.family import patch_size

# diffusers' names for pixels a latent, in height and width, and frames a latent.
SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")

# What pipelines ask for whatever their patches are.
CHECKED = {"Wan": 16, "HunyuanVideo": 16}


def refuse_size(pipe: Any, width: int | None, height: int | None) -> None:
    """Check a picture's size in pixels; None is the pipeline's own.

    A pipeline rounds what does not fit its patches, refuses it, or fails in the middle.

    Raises:
        ValueError: a side of no pixels, not a multiple of what the pipeline needs, or beyond its positions.
    """
    _, rows, columns = patch_size(_config(pipe))
    pixels, whole = _first(pipe, SPATIAL), _whole(pipe)
    longest = _config(pipe).get("rope_max_seq_len")
    for name, side, token in (("width", width, pixels * columns), ("height", height, pixels * rows)):
        if side is None:
            continue
        unit = lcm(token, whole)
        if side < 1 or side % unit:
            raise ValueError(f"{type(pipe).__name__} needs a {name} that is a multiple of {unit}, got {side}.")
        if longest is not None and side // token > longest:
            raise ValueError(f"{type(pipe).__name__} needs a {name} of at most {longest * token}, got {side}.")


def fitted_frames(pipe: Any, frames: int) -> int:
    """The frames that a pipeline makes when it is asked for so many: its latents hold whole groups and one more.

    Raises:
        ValueError: no frames, or more than the pipeline has positions for.
    """
    group = _first(pipe, TEMPORAL)
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}.")
    latents = (frames - 1) // group + 1
    longest = _config(pipe).get("rope_max_seq_len")
    depth = patch_size(_config(pipe))[0]
    if longest is not None and latents // depth > longest:
        most = (longest * depth - 1) * group + 1
        raise ValueError(f"{type(pipe).__name__} makes at most {most} frames, got {frames}.")
    return (latents - 1) * group + 1


def _whole(pipe: Any) -> int:
    """Pixels that a side needs besides whole tokens."""
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    # Of pipelines that pack latents into patches themselves only the processor knows.
    packed = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
    checked = next((unit for prefix, unit in CHECKED.items() if type(pipe).__name__.startswith(prefix)), 1)
    return lcm(packed, checked)


def _config(pipe: Any) -> dict[str, Any]:
    models = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return dict(getattr(next((model for model in models if model is not None), None), "config", {}))


def _first(pipe: Any, names: tuple[str, ...]) -> int:
    return next((int(value) for name in names if (value := getattr(pipe, name, None))), 1)
