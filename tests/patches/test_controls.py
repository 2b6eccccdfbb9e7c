"""Control networks run sparse as the transformers that they add to."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxControlNetPipeline
from diffusers.models import controlnets
from diffusers.models.controlnets import controlnet_flux
from diffusers.models.modeling_utils import ModelMixin

import dit_accel
from dit_accel import Recipe, calibrate, presets
from dit_accel.layout import TokenLayout
from dit_accel.patches.families import CONTROLS
from dit_accel.quality.inspect_pipeline import inspect_pipeline
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from tests.patches.test_families import FULL, WINDOW, _calls, _footprint, _seen
from tests.tiny import TINY
from tests.tiny_controls import CONTROL_MODELS

# Of U-Nets, of linear attention, or lists of others.
LEFT_ALONE = {
    "ControlNetModel",
    "ControlNetUnionModel",
    "ControlNetXSAdapter",
    "UNetControlNetXSModel",
    "SparseControlNetModel",
    "SanaControlNetModel",
}

every = pytest.mark.parametrize("name", CONTROL_MODELS)


@pytest.fixture(autouse=True)
def _resize(monkeypatch):
    """Cosmos resizes its masks with torchvision, which tests do without."""
    try:
        module = importlib.import_module("diffusers.models.controlnets.controlnet_cosmos")
    except ImportError:
        return
    functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    modes = SimpleNamespace(NEAREST="nearest")
    monkeypatch.setattr(
        module, "transforms", SimpleNamespace(functional=functional, InterpolationMode=modes), raising=False
    )


def test_every_control_network_is_declared_or_left_alone():
    found = set()
    for info in pkgutil.walk_packages(controlnets.__path__, controlnets.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                found.add(name)
    declared = {name for family in CONTROLS for name in family.transformers}
    several = {name for name in found if "Multi" in name}
    assert found - declared - LEFT_ALONE - several == set()
    assert declared == {tiny.kind for tiny in CONTROL_MODELS.values()}


@every
def test_dense_is_bit_equal_and_removal_is_complete(name):
    tiny = CONTROL_MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    before = _footprint(model)
    with dit_accel.patch(model, "dense") as handle:
        assert torch.equal(tiny.run(model), plain)
        assert all(layer.dense_calls for layer in handle.summary().layers)
    assert _footprint(model) == before
    assert torch.equal(tiny.run(model), plain)


@every
def test_all_blocks_are_dense_attention(name):
    tiny = CONTROL_MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    with dit_accel.patch(model, FULL, backend="torch") as handle:
        out = tiny.run(model)
        assert not handle.summary().dense_calls
    assert (out - plain).abs().max() <= tiny.tolerance * plain.abs().max()


@every
def test_sparse_is_dense_with_the_mask(name):
    tiny = CONTROL_MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    with dit_accel.patch(model, WINDOW, backend="torch") as handle:
        calls, out = _calls(handle, lambda: tiny.run(model))
        summary = handle.summary()
    assert not summary.dense_calls
    assert summary.density < 1
    assert not torch.allclose(out, plain, rtol=1e-3)
    layouts = {TokenLayout(tiny.grid, start, length) for length, start in tiny.layouts.items()}
    assert {call.layout for call, _ in calls} == layouts
    for call, output in calls:
        seen = _seen(tiny, call.q.shape[1])
        keys = torch.ones(1, len(seen), dtype=torch.bool) if call.key_mask is None else call.key_mask
        q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
        expected = F.scaled_dot_product_attention(q, k, v, seen & keys[:, None, None], scale=call.scale)
        assert (output.double() - expected.transpose(1, 2)).abs().max() <= tiny.tolerance


def _pipeline(several=False):
    """A tiny FLUX with one control network, or two, and a run of it."""
    parts = TINY["flux"].build().components
    nets = []
    for seed in range(1 + several):
        torch.manual_seed(seed)
        net = FluxControlNetModel.from_transformer(
            parts["transformer"], num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        )
        for parameter in net.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
        nets.append(net.eval())
    whole = controlnet_flux.FluxMultiControlNetModel(nets) if several else nets[0]
    given = parts | {"controlnet": whole, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = FluxControlNetPipeline(**{name: given[name] for name in given if name in _TAKEN})
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(5))

    def run():
        generator = torch.Generator().manual_seed(0)
        arguments = TINY["flux"].call(generator) | {"height": 24, "width": 40}
        control = {"control_image": [image, image.flip(-1)]} if several else {"control_image": image}
        if several:
            control["controlnet_conditioning_scale"] = [0.7, 0.6]
        return pipe(**arguments, **control, num_inference_steps=4, generator=generator, output_type="latent").images

    return pipe, run


_TAKEN = inspect.signature(FluxControlNetPipeline.__init__).parameters
RECIPE = Recipe(
    Tiles((1, 4, 4)), Mass(density=0.3, block=(32, 32)), schedule=Schedule(dense_fraction=0.25, refresh_every=2)
)


@pytest.mark.parametrize("several", [False, True])
def test_a_pipeline_is_patched_with_its_control_networks(several):
    pipe, run = _pipeline(several)
    plain = run()
    before = _footprint(pipe.controlnet)
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(run(), plain)
    calls = []
    with dit_accel.patch(pipe, RECIPE) as handle, handle.observe(lambda name, call: calls.append((name, call))):
        out = run()
        summary = handle.summary()
    names = {"controlnet.nets.0", "controlnet.nets.1"} if several else {"controlnet"}
    assert {name for name, _ in calls} == {"transformer"} | names
    for name in {"transformer"} | names:
        # At the same steps as the transformer's.
        assert {call.step.index for one, call in calls if one == name} == {0, 1, 2, 3}
        assert {call.plan is None for one, call in calls if one == name and call.step.index} == {False}
    assert summary.dense_calls.keys() == {"dense phase"}
    assert not any("unknown" in note for note in summary.notes)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, plain, rtol=1e-3)
    assert _footprint(pipe.controlnet) == before
    assert torch.equal(run(), plain)


def test_a_patched_control_network_is_not_patched_twice():
    pipe, _ = _pipeline()
    with (
        dit_accel.patch(pipe.controlnet, "dense"),
        pytest.raises(ValueError, match="controlnet is patched already"),
    ):
        dit_accel.patch(pipe, "dense")
    with dit_accel.patch(pipe, "dense"):
        pass


def test_a_reuse_is_the_transformers_alone():
    pipe, run = _pipeline()
    plain = run()
    with dit_accel.patch(pipe, Recipe(reuse=Listed((0, 1), 4))) as handle:
        assert torch.equal(run(), plain)
        assert any("a control network adds to the latents" in note for note in handle.summary().notes)


def test_what_was_made_for_a_transformers_layers_leaves_control_networks_dense():
    pipe, run = _pipeline()
    layers = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    shares = ((0.3, 0.6),) * layers
    recipe = presets.resolve(RECIPE).with_fields({"select.head_densities": shares})
    with dit_accel.patch(pipe, recipe) as handle:
        assert set(handle.sessions) == {"transformer"}
        run()
        assert any("controlnet stays dense" in note for note in handle.summary().notes)


def test_calibrations_and_inspections_are_of_the_transformer(tmp_path):
    pipe, run = _pipeline()
    call = TINY["flux"].call(torch.Generator().manual_seed(0)) | {"height": 24, "width": 40}
    call["control_image"] = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(5))
    artifact = calibrate(pipe, [call], RECIPE, buckets=1, generate_kwargs={"num_inference_steps": 4})
    assert set(artifact.transformers) == {"transformer"}
    with dit_accel.patch(pipe, RECIPE, calibration=artifact) as handle:
        run()
        assert set(handle.sessions) == {"transformer"}
        assert any("controlnet stays dense" in note for note in handle.summary().notes)
        assert handle.summary().sparse_calls
    seen = inspect_pipeline(pipe, run, tmp_path, recipe=RECIPE, steps=[1])
    layers = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert {found.layer for found in seen.findings} == set(range(layers))
    assert len(seen.findings) == len({(found.layer, found.head, found.order) for found in seen.findings})
