"""Wan's video autoencoder behind the interface that image pipelines have for theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from .dtypes import dtype_argument

# diffusers' lazy imports hide its classes from a type checker.
_Stock: Any = diffusers.AutoencoderKLWan


class ImageAutoencoder(_Stock):
    """``AutoencoderKLWan`` for single images: no axis of frames, and latents that are normalised already.

    FLUX's pipelines scale latents by one factor and one shift, which are 1 and 0 here; Wan's statistics are of each
    channel. Numbers are computed in the weights' dtype and returned in the input's.
    """

    @classmethod
    def of(cls, folder: Path) -> ImageAutoencoder:
        """The autoencoder of a folder that ``AutoencoderKLWan`` wrote, in float32."""
        vae: ImageAutoencoder = cls.from_pretrained(folder, **dtype_argument(torch.float32))
        # A pipeline reads pixels a latent off the number of these, and nothing else.
        halvings = vae.config.scale_factor_spatial.bit_length()
        vae.register_to_config(
            block_out_channels=[vae.config.base_dim] * halvings,
            latent_channels=vae.config.z_dim,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        return vae

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = (self.config.latents_mean, self.config.latents_std)
        mean, std = (torch.tensor(channels, device=self.device).view(1, -1, 1, 1) for channels in values)
        return mean, std

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """The posterior ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        moments = super().encode(x.unsqueeze(2).to(self.dtype)).latent_dist.parameters[:, :, 0].float()
        (mean, log_variance), (shift, scale) = moments.chunk(2, dim=1), self._statistics()
        parameters = torch.cat([(mean - shift) / scale, log_variance - 2 * scale.log()], dim=1)
        posterior = DiagonalGaussianDistribution(parameters.to(x.dtype))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Images ``[B, 3, H, W]`` of normalised latents ``[B, C, h, w]``."""
        shift, scale = self._statistics()
        latents = (z.float() * scale + shift).unsqueeze(2)
        sample = super().decode(latents.to(self.dtype)).sample[:, :, 0].to(z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
