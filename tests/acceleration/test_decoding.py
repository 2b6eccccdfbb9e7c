"""The autoencoder's settings: near the same pictures, and given back to the bit."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.acceleration.decoding import read_settings, set_vae
from tests.recipes import POOLED
from tests.tiny import TINY


def _state(vae):
    return {
        name: (tensor.clone(), tensor.stride()) for name, tensor in (*vae.named_parameters(), *vae.named_buffers())
    }, {name: value for name, value in vars(vae).items() if not name.startswith("_")}


def _same(vae, state) -> bool:
    tensors, switches = _state(vae)
    return switches == state[1] and all(
        torch.equal(tensors[name][0], first) and tensors[name][1] == stride
        for name, (first, stride) in state[0].items()
    )


@pytest.mark.parametrize("family", ["wan", "hunyuan", "cogvideox", "ltx", "flux", "qwen-image"])
@pytest.mark.parametrize("settings", ["bf16", "channels_last", "bf16,channels_last", "tiled"])
def test_pictures_stay_near_and_everything_comes_back(family, settings):
    tiny = TINY[family]
    pipe = tiny.build()
    before = _state(pipe.vae)
    plain = tiny.run(pipe, output_type="pt")
    undo, said = set_vae(pipe, settings)
    assert said == "autoencoder: " + ", ".join(read_settings(settings))
    got = tiny.run(pipe, output_type="pt")
    # A bf16 number is off by 1/256 of itself, and a small network adds up a few of them. A tile's edge lacks its
    # neighbours.
    tolerance = {"bf16": 0.05, "tiled": 0.02}.get(settings.split(",")[0], 1e-4)
    assert (got.float() - plain.float()).abs().mean() <= tolerance
    if "bf16" in settings:
        assert pipe.vae.dtype == torch.bfloat16
        assert not torch.equal(got.float(), plain)
    if settings == "tiled":
        assert pipe.vae.use_tiling
    undo()
    assert _same(pipe.vae, before)
    assert torch.equal(tiny.run(pipe, output_type="pt"), plain)


def test_channels_last_weights():
    pipe = TINY["wan"].build()
    set_vae(pipe, "channels_last")
    weight = pipe.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("fast", "vae takes some of tiled, sliced, channels_last, bf16, fp16, compiled, got fast"),
        ("bf16,fp16", "vae takes one of bf16, fp16, got both"),
        ("", "got none"),
        ([], "got none"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, said):
    pipe = TINY["wan"].build()
    before = _state(pipe.vae)
    with pytest.raises(ValueError, match=said):
        dit_accel.accelerate(pipe, POOLED, vae=settings)
    assert _same(pipe.vae, before)
    dit_accel.patch(pipe, POOLED).remove()


def test_a_switch_that_the_user_had_set_stays():
    pipe = TINY["wan"].build()
    pipe.vae.enable_tiling(tile_sample_min_height=64)
    undo, _ = set_vae(pipe, "tiled,bf16")
    undo()
    assert pipe.vae.use_tiling
    assert pipe.vae.tile_sample_min_height == 64
