"""Tiny diffusers pipelines with random weights, offline, and how to run each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

diffusers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipeline: how to build it, how to run it, and the layers of its transformer."""

    build: Callable[..., Any]
    call: Callable[[torch.Generator], dict[str, Any]]
    output: str = "frames"

    def run(self, pipe: Any, steps: int = 3, **changes: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = self.call(generator) | {
            "num_inference_steps": steps,
            "generator": generator,
            "output_type": "latent",
        }
        return getattr(pipe(**arguments | changes), self.output)


def _wan_transformer(layers: int, **changes: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        }
        | changes
    )


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _wan(layers: int = 2, two: bool = False) -> WanPipeline:
    torch.manual_seed(0)
    extra = {"transformer_2": _wan_transformer(layers), "boundary_ratio": 0.5} if two else {}
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_wan_vae(),
        transformer=_wan_transformer(layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **extra,
    )


def _wan_call(generator: torch.Generator) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "height": 96,
        "width": 112,
        "num_frames": 9,
        "guidance_scale": 5.0,
    }


def _vace(layers: int = 2) -> WanVACEPipeline:
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=96,
    )
    return WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_wan_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _hunyuan(layers: int = 1) -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _hunyuan_call(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": torch.randn(1, 8, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
        "prompt_attention_mask": mask,
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "guidance_scale": 6.0,
    }


def _cogvideox(layers: int = 2) -> CogVideoXPipeline:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=14,
        sample_height=12,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def _cogvideox_call(generator: torch.Generator) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "height": 96,
        "width": 112,
        "num_frames": 9,
        "max_sequence_length": 16,
        "guidance_scale": 6.0,
    }


def _ltx(layers: int = 2) -> LTXPipeline:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _ltx_call(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 10:] = 0
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "negative_prompt_attention_mask": mask,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }


def _image_vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def _flux(layers: int = 1) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _flux_call(generator: torch.Generator) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        "height": 24,
        "width": 40,
        "guidance_scale": 3.5,
    }


def _sd3(layers: int = 2) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _sd3_call(generator: torch.Generator) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(1, 10, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 10, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 64, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(1, 64, generator=generator),
        "height": 12,
        "width": 16,
        "guidance_scale": 5.0,
    }


def _qwen_image(layers: int = 2) -> QwenImagePipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4 * 6,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def _qwen_image_call(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, 5:] = 0
    return {
        "prompt_embeds": torch.randn(1, 7, 16, generator=generator),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 7, 16, generator=generator),
        "negative_prompt_embeds_mask": mask,
        "height": 80,
        "width": 96,
        "true_cfg_scale": 2.0,
    }


TINY: dict[str, Tiny] = {
    "wan": Tiny(_wan, _wan_call),
    "wan2.2": Tiny(lambda layers=2: _wan(layers, two=True), _wan_call),
    "wan-vace": Tiny(_vace, _wan_call),
    "hunyuan": Tiny(_hunyuan, _hunyuan_call),
    "cogvideox": Tiny(_cogvideox, _cogvideox_call),
    "ltx": Tiny(_ltx, _ltx_call),
    "flux": Tiny(_flux, _flux_call, "images"),
    "sd3": Tiny(_sd3, _sd3_call, "images"),
    "qwen-image": Tiny(_qwen_image, _qwen_image_call, "images"),
}
