"""Pipelines of the families that show no progress, or more than one attention call of a layer in a forward."""

import pytest
import torch
from diffusers import (
    AutoencoderKLMochi,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    PixArtSigmaPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_accel
from tests.recipes import POOLED
from tests.tiny import _image_vae
from tests.tiny_registry import MODELS


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


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    # Guidance is one forward of two samples; two layers each.
    [(DDIMScheduler, [None] * 8), (DPMSolverMultistepScheduler, [0, 0, 1, 1, 2, 2, 3, 3])],
)
def test_pixart_names_no_timestep(scheduler, steps):
    """DDIM shows no step either; the recipe runs sparse all the same."""
    torch.manual_seed(0)
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_image_vae(4),
        transformer=MODELS["pixart"].build().float(),
        scheduler=scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        embeds = torch.randn(2, 1, 9, 8, generator=generator)
        masks = torch.ones(1, 9)
        return pipe(
            prompt=None, negative_prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1],
            prompt_attention_mask=masks, negative_prompt_attention_mask=masks, height=24, width=32,
            use_resolution_binning=False, num_inference_steps=4, generator=generator, output_type="latent",
        ).images  # fmt: skip

    plain = run()
    recipe = POOLED.with_fields({"schedule.dense_fraction": 0.25, "schedule.refresh_every": 2})
    with dit_accel.patch(pipe, recipe) as handle:
        calls = []
        with handle.observe(lambda _, call: calls.append((call.step.index, call.plan is not None))):
            assert not torch.equal(run(), plain)
        unknown = any("step is unknown" in note for note in handle.summary().notes)
    assert [index for index, _ in calls] == steps
    assert all(sparse == (index != 0) for index, sparse in calls)
    assert unknown == (None in steps)
    assert torch.equal(run(), plain)


def test_mochi_keeps_a_plan_for_each_branch_of_its_guidance():
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = MochiPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=MODELS["mochi"].build().float(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)

    def run(generator: torch.Generator) -> torch.Tensor:
        embeds, mask = torch.randn(2, 1, 16, 16, generator=generator), torch.ones(1, 16, dtype=torch.bool)
        return pipe(
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask, height=192, width=112, num_frames=7, num_inference_steps=4,
            generator=generator, output_type="latent",
        ).frames  # fmt: skip

    with dit_accel.patch(pipe, POOLED.with_fields({"schedule.refresh_every": 4})) as handle:
        seen = []
        with handle.observe(lambda _, call: seen.append((call.step.index, call.step.branch))):
            run(torch.Generator().manual_seed(0))
        summary = handle.summary()
    assert seen[:4] == [(0, "cond_uncond"), (0, "cond_uncond[1]")] * 2
    assert [layer.plans_made for layer in summary.layers] == [2, 2]
    assert not summary.dense_calls


KEPT = POOLED.with_fields({"schedule.refresh_every": 3})


def _halves(given: dict[str, object]) -> list[dict[str, object]]:
    return [{name: value[i : i + 1] for name, value in given.items()} for i in range(2)]


def _of_equal_length() -> dict[str, object]:
    given = MODELS["mochi"].given()
    given["encoder_attention_mask"][:] = given["encoder_attention_mask"][0]
    return given


def test_samples_that_attend_one_by_one_have_plans_of_their_own():
    tiny = MODELS["mochi"]
    model = tiny.build()
    given = _of_equal_length()
    alone = []
    for half in _halves(given):
        with dit_accel.patch(model, KEPT):
            alone.append(tiny.run(model, half))
    with dit_accel.patch(model, KEPT) as handle:
        for _ in range(3):
            assert (tiny.run(model, given) - torch.cat(alone)).abs().max() <= 1e-9
        made = [layer.plans_made for layer in handle.summary().layers]
    # One for each sample, kept for three forwards.
    assert made == [2, 2]


def _gradient(model: torch.nn.Module, given: dict[str, object]) -> torch.Tensor:
    latents = given["hidden_states"].clone().requires_grad_()
    model(**given | {"hidden_states": latents}, return_dict=False)[0].square().sum().backward()
    return latents.grad


def test_samples_that_attend_one_by_one_are_repeated_with_their_plans():
    tiny = MODELS["mochi"]
    model = tiny.build()
    model.enable_gradient_checkpointing()
    given = _of_equal_length()
    alone = []
    for half in _halves(given):
        with dit_accel.patch(model, KEPT):
            alone.append(_gradient(model, half))
    with dit_accel.patch(model, KEPT):
        for _ in range(2):
            assert (_gradient(model, given) - torch.cat(alone)).abs().max() <= 1e-9


class _OneByOne(WanAttnProcessor):
    """Wan's self-attention, a call for each sample, which a graph can hold."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        outputs = [dispatch_attention_fn(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))]
        return attn.to_out[1](attn.to_out[0](torch.cat(outputs).flatten(2, 3)))


def test_compiled_samples_that_attend_one_by_one_get_their_gradients():
    tiny = MODELS["chronoedit"]
    given = {name: torch.cat([value, value.roll(1, -1)]) for name, value in tiny.given().items()}
    gradients = []
    for compiled in (False, True):
        model = tiny.build()
        for block in model.blocks:
            block.attn1.set_processor(_OneByOne())
        with dit_accel.patch(model, KEPT):
            if compiled:
                for block in model.blocks:
                    block.compile(backend="aot_eager", fullgraph=True)
            # The second forward finds the plans of the first.
            gradients.append([_gradient(model, given) for _ in range(2)])
    torch._dynamo.reset()
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).abs().max() <= 1e-9 * eager.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_transformer_finds_its_latents(name):
    tiny = MODELS[name]
    model = tiny.build()
    with dit_accel.patch(model, POOLED) as handle:
        expected = tiny.run(model)
        sparse = handle.summary().sparse_calls
    with dit_accel.patch(model, POOLED) as handle:
        model.compile(backend="eager")
        assert (tiny.run(model) - expected).abs().max() <= tiny.tolerance * expected.abs().max()
        assert handle.summary().sparse_calls == sparse
    torch._dynamo.reset()
