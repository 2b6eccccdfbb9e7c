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
        ("fast", "bf16, fp16, compiled, frames=N, tile=N, got fast"),
        ("bf16,fp16", "vae takes one of bf16, fp16, got both"),
        ("", "got none"),
        ([], "got none"),
        ("frames", "got frames"),
        ("frames=0", "got frames=0"),
        ("bf16,frames=x", "got frames=x"),
        ("frames=2,frames=4", "vae takes one number for each setting, got frames=2, frames=4"),
        ("tile=100", "vae takes tiles of a multiple of 8 pixels, more than their overlap of 64, got tile=100"),
        ("frames=2,tile=64", "more than their overlap of 64, got tile=64"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, said):
    pipe = TINY["wan"].build()
    before = _state(pipe.vae)
    with pytest.raises(ValueError, match=said):
        dit_accel.accelerate(pipe, POOLED, vae=settings)
    assert _same(pipe.vae, before)
    dit_accel.patch(pipe, POOLED).remove()


@pytest.mark.parametrize("family", ["cogvideox", "flux"])
def test_tiles_of_another_kind_are_refused(family):
    pipe = TINY[family].build()
    with pytest.raises(
        ValueError, match=f"{type(pipe.vae).__name__} has no tiles whose side can be set, got vae=tile=64"
    ):
        set_vae(pipe, "tile=64")


@pytest.mark.parametrize("family", ["wan", "hunyuan", "ltx", "qwen-image"])
def test_larger_tiles(family):
    """Fewer of them, and where all is one tile the very pixels of an autoencoder without."""
    tiny = TINY[family]
    pipe = tiny.build()
    call = {"output_type": "pt", "height": 352, "width": 384} | ({} if family == "qwen-image" else {"num_frames": 1})
    before = _state(pipe.vae)
    calls: list[int] = []
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    whole = tiny.run(pipe, steps=1, **call)
    alone = len(calls)
    for side, tiles in ((256, 4), (384, 1)):
        calls.clear()
        undo, said = set_vae(pipe, f"tile={side}")
        assert said == f"autoencoder: tile={side}"
        got = tiny.run(pipe, steps=1, **call)
        assert len(calls) == tiles * alone
        assert torch.equal(got, whole) == (tiles == 1)
        assert (got - whole).abs().mean() <= 0.02
        undo()
        assert _same(pipe.vae, before)


def test_a_switch_that_the_user_had_set_stays():
    pipe = TINY["wan"].build()
    pipe.vae.enable_tiling(tile_sample_min_height=64)
    undo, _ = set_vae(pipe, "tiled,bf16")
    undo()
    assert pipe.vae.use_tiling
    assert pipe.vae.tile_sample_min_height == 64
