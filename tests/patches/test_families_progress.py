"""Pipelines of the families that show no progress, or more than one attention call of a layer in a forward."""

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

import dit_accel
from tests.recipes import POOLED
from tests.tiny_models import MODELS


def _forcing() -> SkyReelsV2DiffusionForcingPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=MODELS["skyreels"].build().float(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True),
    )


@torch.no_grad()
def _run(pipe: SkyReelsV2DiffusionForcingPipeline, **changes: object) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 16, 16, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 16, 16, generator=generator),
        "height": 96,
        "width": 112,
        "num_frames": 9,
        "base_num_frames": 9,
        "num_inference_steps": 6,
        "output_type": "latent",
        "generator": generator,
    }
    return pipe(**arguments | changes).frames


@pytest.mark.parametrize("ar_step", [0, 3])
def test_diffusion_forcing_steps_copies_of_its_scheduler_and_runs_sparse(ar_step):
    """With one frame after the other, the largest of the frames' timesteps stays for most of the run."""
    pipe = _forcing()
    plain = _run(pipe, ar_step=ar_step)
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(_run(pipe, ar_step=ar_step), plain)
    recipe = POOLED.with_fields({"schedule.dense_fraction": 0.3, "schedule.refresh_every": 4})
    with dit_accel.patch(pipe, recipe) as handle:
        steps = []
        with handle.observe(lambda _, call: steps.append((call.plan is not None, call.step.index))):
            assert not torch.equal(_run(pipe, ar_step=ar_step), plain)
        summary = handle.summary()
    assert any("step is unknown" in note for note in summary.notes)
    forwards = len(steps) // 2
    # The first step looks like any other pipeline's, in both guidance branches; from the second on nothing is known.
    assert [index for _, index in steps] == [0] * 4 + [None] * (2 * forwards - 4)
    assert all(sparse for sparse, index in steps if index is None)
    assert torch.equal(_run(pipe, ar_step=ar_step), plain)
