"""The autoencoder's settings: near the same pictures, and given back to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel.acceleration import decoding
from dit_accel.acceleration.decoding import read_settings, set_vae
from tests.recipes import POOLED
from tests.tiny import TINY

EMULATES = decoding.emulates  # before conftest.py stands in for it


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("bf16", "autoencoder: not bf16, which this CPU emulates and takes many times as long as float32"),
        ("fp16,tiled", "autoencoder: tiled; not fp16, which this CPU emulates and takes many times as long as float32"),
    ],
)
def test_a_cpu_that_emulates_a_dtype_keeps_float32(settings, said, monkeypatch):
    monkeypatch.setattr(decoding, "emulates", lambda _dtype: True)
    pipe = TINY["wan"].build()
    undo, told = set_vae(pipe, settings)
    assert told == said
    assert pipe.vae.dtype == torch.float32
    assert pipe.vae.use_tiling == ("tiled" in settings)
    undo()
    # What is in it already stays, and what runs on another device than it lies on is cast.
    pipe.vae.to(torch.bfloat16)
    assert set_vae(pipe, "bf16")[1] == "autoencoder: bf16"
    offloaded = SimpleNamespace(vae=TINY["flux"].build().vae, _execution_device=torch.device("meta"))
    assert set_vae(offloaded, "bf16")[1] == "autoencoder: bf16"
    assert offloaded.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("has", [True, False, None])
def test_what_a_cpu_emulates(dtype, name, has, monkeypatch):
    asked = {} if has is None else {f"_is_mkldnn_{name}_supported": lambda: has}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**asked))
    assert EMULATES(dtype) == (has is not True)


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


def test_a_switch_that_the_user_sets_meanwhile_stays():
    pipe = TINY["wan"].build()
    undo, _ = set_vae(pipe, "sliced,bf16")
    pipe.vae.enable_tiling(tile_sample_min_height=64)
    undo()
    assert pipe.vae.use_tiling
    assert pipe.vae.tile_sample_min_height == 64
    assert not pipe.vae.use_slicing


def test_a_method_that_the_user_wraps_meanwhile_stays():
    pipe, tiny = TINY["wan"].build(), TINY["wan"]
    plain = tiny.run(pipe, steps=1, output_type="pt")
    undo, _ = set_vae(pipe, "bf16,frames=2")
    calls, ours = [], pipe.vae.decode

    def wrapper(*args, **options):
        calls.append(1)
        return ours(*args, **options)

    pipe.vae.decode = wrapper
    undo()
    assert pipe.vae.decode is wrapper
    assert torch.equal(tiny.run(pipe, steps=1, output_type="pt"), plain)
    assert calls == [1]


def test_a_method_that_others_put_back_meanwhile_is_no_error():
    pipe = TINY["wan"].build()
    before = _state(pipe.vae)
    undo, _ = set_vae(pipe, "bf16")
    del pipe.vae.decode
    undo()
    assert _same(pipe.vae, before)
    assert not {"decode", "encode"} & vars(pipe.vae).keys()


@pytest.mark.parametrize("setting", ["tiled", "sliced", "compiled"])
def test_an_autoencoder_without_such_a_switch_is_refused(setting):
    """diffusers' mixin gives ``enable_tiling`` to all, and fails when it is called."""
    from diffusers import AsymmetricAutoencoderKL

    vae = AsymmetricAutoencoderKL(
        down_block_out_channels=(32,), up_block_out_channels=(32,), norm_num_groups=8, latent_channels=4
    )
    if setting == "compiled":
        del vae.decoder
    with pytest.raises(ValueError, match=f"AsymmetricAutoencoderKL cannot be {setting}"):
        set_vae(SimpleNamespace(vae=vae), f"bf16,{setting}")
    assert vae.dtype == torch.float32


def test_the_last_of_two_dtypes_holds_and_the_first_holds_again():
    vae = TINY["flux"].build().vae
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = SimpleNamespace(vae=vae)
    plain = vae.decode(latents).sample
    undo_bf16, _ = set_vae(pipe, "bf16")
    rounded = vae.decode(latents).sample
    undo_fp16, _ = set_vae(pipe, "fp16")
    assert vae.dtype == vae.decode(latents).sample.dtype == vae.encode(plain).latent_dist.mean.dtype == torch.float16
    undo_fp16()
    assert torch.equal(vae.decode(latents).sample, rounded)
    undo_fp16, _ = set_vae(pipe, "fp16")
    undo_bf16()
    alone = TINY["flux"].build().vae
    set_vae(SimpleNamespace(vae=alone), "fp16")
    assert torch.equal(vae.decode(latents).sample, alone.decode(latents).sample)
    undo_fp16()
    assert torch.equal(vae.decode(latents).sample, plain)


def test_weights_that_a_pipeline_casts_itself_get_their_own_dtype():
    """Some pipelines make their autoencoder float32 before they decode."""
    pipe = SimpleNamespace(vae=TINY["flux"].build().vae)
    undo, _ = set_vae(pipe, "bf16")
    pipe.vae.to(torch.float32)
    latents = torch.randn(1, pipe.vae.config.latent_channels, 8, 8, dtype=torch.bfloat16)
    assert pipe.vae.decode(latents).sample.dtype == torch.float32
    undo()


def test_a_decoder_that_two_compile_is_compiled_until_the_last_is_undone():
    pipe = SimpleNamespace(vae=TINY["flux"].build().vae)
    first, second = set_vae(pipe, "compiled")[0], set_vae(pipe, "compiled")[0]
    first()
    assert pipe.vae.decoder._compiled_call_impl is not None
    second()
    assert pipe.vae.decoder._compiled_call_impl is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("settings", [("bf16", "frames=2", "tile=96"), ("frames=2,bf16", "frames=3", "bf16,sliced")])
def test_pipelines_that_share_an_autoencoder_give_it_back_in_any_order(settings, order):
    """What is left at each point is what the others' settings alone make of it."""
    pipe, tiny = TINY["wan"].build(), TINY["wan"]
    pipes = [pipe, *(type(pipe)(**pipe.components | {"transformer": tiny.build().transformer}) for _ in settings[1:])]
    before = _state(pipe.vae)
    plain = tiny.run(pipe, steps=1, output_type="pt")
    handles = [dit_accel.accelerate(one, "dense", vae=said) for one, said in zip(pipes, settings, strict=True)]
    left = list(settings)
    for number in order:
        handles[number].remove()
        left.remove(settings[number])
        alone = tiny.build()
        for said in left:
            set_vae(alone, said)
        assert all(
            torch.equal(one, other) for one, other in zip(pipe.vae.parameters(), alone.vae.parameters(), strict=True)
        )
        assert torch.equal(tiny.run(pipe, steps=1, output_type="pt"), tiny.run(alone, steps=1, output_type="pt"))
        handles[number].remove()
    assert _same(pipe.vae, before)
    assert not {"decode", "encode", "_decode"} & vars(pipe.vae).keys()
    assert torch.equal(tiny.run(pipe, steps=1, output_type="pt"), plain)
