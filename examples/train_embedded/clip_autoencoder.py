"""Runs `AutoencoderKLWan` over whole clips at once: equal to its own loop over chunks, but faster.

The stock `encode` and `decode` feed one latent frame after another through caches of past frames. All
convolutions are causal, so one pass over the clip gives the same numbers, provided the first frame is kept
out of the temporal up- and downsampling as the stock loop does. `tests/pipelines/test_embedded.py` compares
both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    patchify,
    unpatchify,
)

LATENT_CHANNELS = 16
DECODER_DIM = 40


def build_autoencoder() -> AutoencoderKLWan:
    """The embedded autoencoder with random weights: 4 x 8 x 8 compression to 16 channels.

    It has the averaging shortcuts of Wan 2.2's autoencoder, which carry colour and shape through an untrained
    network, and starts with little posterior noise; without the two it learns several times slower.
    """
    vae = AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=DECODER_DIM,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        is_residual=True,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def _spatial(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    n, c, t, h, w = x.shape
    x = layer.resample(x.transpose(1, 2).reshape(n * t, c, h, w))
    return x.view(n, t, *x.shape[1:]).transpose(1, 2)


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        n, c, t, h, w = rest.shape
        rest = layer.time_conv(rest).view(n, 2, c, t, h, w)
        rest = torch.stack((rest[:, 0], rest[:, 1]), dim=3).reshape(n, c, 2 * t, h, w)
        x = torch.cat([first, rest], dim=2)
    x = _spatial(layer, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _normalize(norm: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    # The same as norm(x), as one kernel over channels-last memory: this is where the stock block spends its
    # time.
    with torch.autocast(x.device.type, enabled=False):
        y = F.rms_norm(x.movedim(1, -1), (x.shape[1],), norm.gamma.flatten().to(x.dtype), eps=1e-12)
    return y.movedim(-1, 1)


def _residual(block: WanResidualBlock, x: torch.Tensor) -> torch.Tensor:
    y = block.conv1(F.silu(_normalize(block.norm1, x)))
    y = block.conv2(F.silu(_normalize(block.norm2, y)))
    return y + block.conv_shortcut(x)


def _middle(block: WanMidBlock, x: torch.Tensor) -> torch.Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:]):
        x = _residual(resnet, attention(x))
    return x


def encode_clip(vae: AutoencoderKLWan, clip: torch.Tensor) -> torch.Tensor:
    """[n, 3, 1 + 4k, H, W] in [-1, 1] to the posterior's mean and log variance, [n, 32, 1 + k, H/8, W/8]."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(clip, vae.config.patch_size))
    for block in encoder.down_blocks:
        shortcut = block.avg_shortcut(x)
        for resnet in block.resnets:
            x = _residual(resnet, x)
        if block.downsampler is not None:
            x = _resample(block.downsampler, x)
        x = x + shortcut
    x = _middle(encoder.mid_block, x)
    return vae.quant_conv(encoder.conv_out(F.silu(_normalize(encoder.norm_out, x))))


def decode_clip(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """[n, 16, 1 + k, h, w] (not normalised) to a clip [n, 3, 1 + 4k, 8h, 8w]; values are not clamped."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        shortcut = None if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=True)
        for resnet in block.resnets:
            x = _residual(resnet, x)
        if block.upsampler is not None:
            x = _resample(block.upsampler, x)
        if shortcut is not None:
            x = x + shortcut
    x = decoder.conv_out(F.silu(_normalize(decoder.norm_out, x)))
    return unpatchify(x, vae.config.patch_size)


def latent_statistics(vae: AutoencoderKLWan, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """The channel means and standard deviations of the config, each [1, 16, 1, 1, 1]."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    return mean, std
