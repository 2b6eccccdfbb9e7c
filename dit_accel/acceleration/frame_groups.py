"""Several latent frames in a call of a causal decoder that diffusers calls once for each.

``AutoencoderKLWan`` decodes one latent frame after another, and hands the last two frames before every convolution on
to the next call. A call costs the host a few milliseconds, and each convolution reads those two frames beside the few
that are new. What a frame is decoded to does not depend on how many come with it: all that reaches back in time is the
convolutions, which read the same frames in either case. The first latent frame makes one frame of pixels where others
make four, and stays alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..patches.install import replace_method


def decode_in_groups(vae: nn.Module, frames: int) -> Callable[[], None]:
    """Let an autoencoder decode so many latent frames at once, where it decodes no tiles, and copy less in either case.

    Returns:
        The undo.

    Raises:
        ValueError: an autoencoder that does not decode frame by frame as ``AutoencoderKLWan`` does.
    """
    from diffusers import AutoencoderKLWan

    from .wan_layers import LEANER

    if not isinstance(vae, AutoencoderKLWan):
        raise ValueError(f"vae=frames={frames} is for AutoencoderKLWan, got {type(vae).__name__}.")
    decoder: nn.Module = vae.get_submodule("decoder")
    undone = [replace_method(vae, "_decode", GroupedDecode(vae, frames))]
    for module in decoder.modules():
        if type(module) in LEANER:
            undone.append(partial(setattr, module, "__class__", type(module)))
            module.__class__ = LEANER[type(module)]

    def undo() -> None:
        while undone:
            undone.pop()()

    return undo


class GroupedDecode:
    """``_decode`` of an ``AutoencoderKLWan``."""

    def __init__(self, vae: Any, frames: int) -> None:
        self._vae = vae
        self._frames = frames
        self._one_by_one = vae._decode

    def __call__(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """The pixels ``[B, 3, 1 + 4 (F - 1), H, W]`` in [-1, 1] of latents ``[B, C, F, h, w]``."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
        from diffusers.models.autoencoders.vae import DecoderOutput

        vae = self._vae
        if self._decodes_tiles(z):
            return self._one_by_one(z, return_dict=return_dict)
        vae.clear_cache()
        made: list[torch.Tensor] = []
        first, later = vae.post_quant_conv(z).tensor_split([1], dim=2)
        for latents in (first, *(later.split(self._frames, dim=2) if later.shape[2] else ())):
            place = [0]
            made.append(vae.decoder(latents, feat_cache=vae._feat_map, feat_idx=place, first_chunk=not made))
        vae.clear_cache()
        pixels = torch.cat(made, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        pixels = pixels.clamp(-1.0, 1.0)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def _decodes_tiles(self, z: torch.Tensor) -> bool:
        vae = self._vae
        ratio = vae.spatial_compression_ratio
        return vae.use_tiling and (
            z.shape[-1] > vae.tile_sample_min_width // ratio or z.shape[-2] > vae.tile_sample_min_height // ratio
        )
