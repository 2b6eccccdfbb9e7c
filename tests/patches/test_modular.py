"""Modular pipelines of diffusers, and the guiders that they run their branches by."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel import Recipe
from dit_accel.layout import LatentGrid, TokenLayout
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from tests.tiny import TINY

guiders = pytest.importorskip("diffusers.guiders")

STEPS = 4
RECIPE = Recipe(
    order=Tiles((1, 2, 4)),
    select=Mass(density=0.3, block=(32, 32)),
    schedule=Schedule(dense_fraction=0.25, refresh_every=2),
)
ROOT = "diffusers.modular_pipelines."
# Family of the parts, class of the blocks, further arguments, the layout of the joint layers, and branches.
Case = tuple[str, str, dict[str, Any], TokenLayout, int]
CASES: dict[str, Case] = {
    "wan": ("wan", "wan.modular_blocks_wan.WanCoreDenoiseStep", {}, TokenLayout((3, 6, 7), 0, 126), 2),
    "flux": (
        "flux",
        "flux.modular_blocks_flux.FluxCoreDenoiseStep",
        {"height": 192, "width": 160},
        TokenLayout((1, 12, 10), 16, 136),
        1,
    ),
    "flux-kontext": (
        "flux",
        "flux.modular_blocks_flux_kontext.FluxKontextCoreDenoiseStep",
        {"height": 192, "width": 160, "max_area": 192 * 160, "image_latents": torch.ones(1, 1, 20, 24)},
        TokenLayout((1, 12, 10), 16, 256, (LatentGrid((1, 10, 12), 136),)),
        1,
    ),
    "sd3": (
        "sd3",
        "stable_diffusion_3.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep",
        {"height": 88, "width": 80},
        TokenLayout((1, 11, 10), 0, 120),
        2,
    ),
    "ltx": (
        "ltx",
        "ltx.modular_blocks_ltx.LTXCoreDenoiseStep",
        {"height": 224, "width": 256},
        TokenLayout((2, 7, 8), 0, 112),
        2,
    ),
    "qwen-image": (
        "qwen-image",
        "qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep",
        {"height": 160, "width": 192},
        TokenLayout((1, 10, 12), 7, 127),
        2,
    ),
}


def _modular(name: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The denoising blocks with a tiny pipeline's parts, and a run of them."""
    family, path, more, *_ = CASES[name]
    module, _, cls = path.rpartition(".")
    try:
        blocks = getattr(import_module(ROOT + module), cls)()
    except (ImportError, AttributeError):
        pytest.skip(f"this diffusers has no {cls}")
    parts = TINY[family].build().components
    pipe = blocks.init_pipeline()
    pipe.update_components(**{key: part for key, part in parts.items() if key in pipe.components and part is not None})
    known = set(blocks.input_names)
    given = {key: value for key, value in (TINY[family].call(_seeded()) | more).items() if key in known}

    def run() -> torch.Tensor:
        return pipe(**given, num_inference_steps=STEPS, generator=_seeded(), output="latents")

    return pipe, run


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _watched(pipe: Any, run: Callable[[], torch.Tensor]) -> tuple[list[Any], Any]:
    """The calls of a sparse run, each with its output, and the summary."""
    calls: list[Any] = []
    outputs: list[torch.Tensor] = []
    with (
        dit_accel.patch(pipe, RECIPE, backend="torch") as handle,
        handle.observe(lambda _, call: calls.append(call)),
        handle.tap_outputs(lambda _, out, __: outputs.append(out.clone()) or out),
    ):
        run()
        summary = handle.summary()
    return list(zip(calls, outputs, strict=True)), summary


def _error(call: Any, out: torch.Tensor) -> float:
    """Against attention in float64 to the tokens that the plan shows, in units of the values' largest."""
    seen = torch.zeros(1, 1, call.q.shape[1], call.q.shape[1], dtype=torch.bool)
    shown = call.plan.mask.to_tokens()
    rows = call.plan.rows.long().expand(*shown.shape[:2], -1)
    seen = seen.expand(*shown.shape[:2], -1, -1).clone()
    for b in range(shown.shape[0]):
        for h in range(shown.shape[1]):
            seen[b, h][rows[b, h][:, None], rows[b, h][None]] = shown[b, h]
    if call.key_mask is not None:
        seen = seen & call.key_mask[:, None, None]
    q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
    exact = F.scaled_dot_product_attention(q, k, v, seen, scale=call.scale).transpose(1, 2)
    return float((out.double() - exact).abs().max() / v.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_modular_pipeline_runs_sparse_by_its_steps_and_branches(name: str) -> None:
    pipe, run = _modular(name)
    plain = run()
    with dit_accel.patch(pipe, "dense") as handle:
        assert torch.equal(run(), plain)
        assert set(handle.summary().dense_calls) == {"recipe is dense"}
    *_, layout, branches = CASES[name]
    both, summary = _watched(pipe, run)
    assert {call.step.index for call, _ in both} == set(range(STEPS))
    assert {call.step.num_steps for call, _ in both} == {STEPS}
    assert len({call.step.branch for call, _ in both}) == branches
    assert layout in {call.layout for call, _ in both}
    assert set(summary.dense_calls) == {"dense phase"}
    layers = summary.layers
    # One dense step, then plans at the second and the fourth.
    assert {layer.plans_made for layer in layers} == {2 * branches}
    assert {layer.sparse_calls for layer in layers} == {3 * branches}
    assert summary.density < 1
    # Sums of so many products in float32.
    bound = layout.seq_len * torch.finfo(torch.float32).eps
    for call, out in both:
        assert call.plan is None or _error(call, out) <= bound
    assert torch.equal(run(), plain)


def _skipping(**more: Any) -> Any:
    from diffusers.hooks import LayerSkipConfig

    return LayerSkipConfig(indices=[0], fqn="blocks", **more)


# A guider, and its branches at each step.
GUIDERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "classifier-free": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0), (2, 2, 2, 2)),
    "projected": (lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=5.0), (2, 2, 2, 2)),
    "zero star": (lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=1), (2, 2, 2, 2)),
    "tangential": (lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0), (2, 2, 2, 2)),
    "the prompt alone": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=1.0), (1, 1, 1, 1)),
    "in the middle": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75), (1, 2, 2, 1)),
    "auto": (
        lambda: guiders.AutoGuidance(guidance_scale=5.0, auto_guidance_config=_skipping(dropout=1.0)),
        (2, 2, 2, 2),
    ),
    "skipped layers": (
        lambda: guiders.SkipLayerGuidance(
            guidance_scale=5.0,
            skip_layer_config=_skipping(),
            skip_layer_guidance_start=0.2,
            skip_layer_guidance_stop=1.0,
        ),
        (2, 3, 3, 3),
    ),
    "smoothed energy": (
        lambda: guiders.SmoothedEnergyGuidance(
            guidance_scale=5.0, seg_guidance_layers=[0], seg_guidance_start=0.2, seg_guidance_stop=1.0
        ),
        (2, 3, 3, 3),
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_every_branch_of_a_guider_has_plans_of_its_own(name: str) -> None:
    make, branches = GUIDERS[name]
    pipe, run = _modular("wan")
    pipe.update_components(guider=make())
    plain = run()
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(run(), plain)
    both, summary = _watched(pipe, run)
    found = [len({call.step.branch for call, _ in both if call.step.index == step}) for step in range(STEPS)]
    assert tuple(found) == branches
    assert not {reason for reason in summary.dense_calls if "dense phase" not in reason}
    bound = 126 * torch.finfo(torch.float32).eps
    plans: dict[tuple[int, str], set[int]] = {}
    for call, out in both:
        if call.plan is not None:
            assert _error(call, out) <= bound
            plans.setdefault((call.layer, call.step.index), set()).add(id(call.plan))
    # The last layer attends in every branch.
    for step in range(1, STEPS):
        assert len(plans[1, step]) == branches[step]
    assert torch.equal(run(), plain)
