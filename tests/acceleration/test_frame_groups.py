"""Several latent frames in a call of the decoder: the pixels that diffusers' own loop gives, in any grouping."""

from __future__ import annotations

import copy
from collections import Counter

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.acceleration.decoding import set_vae
from dit_accel.acceleration.frame_groups import decode_in_groups
from dit_accel.acceleration.wan_layers import LEANER, in_one_pass
from tests.tiny import TINY

COMMON = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
PATCHED = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
# As Wan 2.1 has it, Wan 2.2 5B (pixels in patches, shortcuts around whole blocks), and the built-in model.
CONFIGS = {
    "wan2.1": {**COMMON, "z_dim": 4},
    "wan2.2": {**COMMON, **PATCHED, "decoder_base_dim": 6, "z_dim": 6, "scale_factor_spatial": 16},
    "embedded": {**COMMON, **PATCHED, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "z_dim": 4},
}


def autoencoder(name: str, dtype: torch.dtype = torch.float64) -> diffusers.AutoencoderKLWan:
    torch.manual_seed(0)
    channels = CONFIGS[name]["z_dim"]
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = diffusers.AutoencoderKLWan(**CONFIGS[name], **statistics).to(dtype).eval().requires_grad_(False)
    for part, values in vae.decoder.named_parameters():
        if part.endswith("gamma"):
            values.uniform_(0.5, 2.0)
    return vae


def latents(vae: diffusers.AutoencoderKLWan, frames: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(batch, vae.config.z_dim, frames, 3, 4, generator=generator, dtype=vae.dtype)


@pytest.mark.parametrize("frames", [1, 5, 29, 81])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_grouping_gives_the_same_pixels(name, frames):
    vae = autoencoder(name)
    z = latents(vae, (frames - 1) // 4 + 1)
    expected = vae.decode(z).sample
    assert expected.shape[2] == frames
    assert expected.std() > 0.05
    for group in (1, 2, 3, 4, 7, 20, 64):
        undo = decode_in_groups(vae, group)
        got = vae.decode(z).sample
        undo()
        assert (got - expected).abs().max() <= 1e-12, group


@pytest.mark.parametrize("name", CONFIGS)
def test_in_float32_to_rounding(name):
    """The error to float64 is the loop's own: convolutions may add up in another order, and nothing else differs."""
    vae = autoencoder(name)
    z = latents(vae, 8)
    exact = vae.decode(z).sample
    vae, z = vae.float(), z.float()
    own = (vae.decode(z).sample - exact).abs().max()
    decode_in_groups(vae, 4)
    assert (vae.decode(z).sample - exact).abs().max() <= 2 * own + 4 * torch.finfo(torch.float32).eps


def test_a_call_of_the_decoder_for_each_group():
    """The first latent frame by itself, then groups, the last as long as it comes; nothing stays of the last clip."""
    vae, seen = autoencoder("wan2.1"), []
    vae.decoder.register_forward_pre_hook(
        lambda _, given, options: seen.append((given[0].shape[2], options["first_chunk"])), with_kwargs=True
    )
    decode_in_groups(vae, 3)
    z = latents(vae, 9)
    first = vae.decode(z).sample
    assert seen == [(1, True), (3, False), (3, False), (2, False)]
    assert all(kept is None for kept in vae._feat_map)
    assert torch.equal(vae.decode(z, return_dict=False)[0], first)


def test_batches_slices_copies_and_tiles():
    vae = autoencoder("wan2.2")
    z = latents(vae, 6, batch=2)
    expected = vae.decode(z).sample
    vae.enable_tiling(64, 64, 32, 32)
    wide = torch.cat([z, z], dim=-1)
    tiled = vae.decode(wide).sample
    vae.use_tiling = False
    undo = decode_in_groups(vae, 4)
    twin = copy.deepcopy(vae)
    twin.use_slicing = True
    for one in (vae, twin):
        assert (one.decode(z).sample - expected).abs().max() <= 1e-12
    # Tiles are diffusers' own; what is no larger than a tile is not cut.
    twin.use_slicing, twin.use_tiling = False, True
    assert (twin.decode(wide).sample - tiled).abs().max() <= 1e-12
    assert (twin.decode(z).sample - expected).abs().max() <= 1e-12
    undo()
    assert "_decode" not in vars(vae)
    assert not set(LEANER.values()) & {type(module) for module in vae.modules()}
    assert torch.equal(vae.decode(z).sample, expected)
    undo = decode_in_groups(twin, 2)
    undo()
    assert twin._decode._frames == 4  # what it had before


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_layers_pass_over_their_inputs_less_often():
    vae = autoencoder("wan2.1")
    z = latents(vae, 9)
    with Counted() as before:
        vae.decode(z)
    undo = decode_in_groups(vae, 1)
    with Counted() as one:
        vae.decode(z)
    undo()
    decode_in_groups(vae, 4)
    with Counted() as four:
        vae.decode(z)
    norms = before.counts["linalg_vector_norm"]
    assert one.counts["convolution"] == before.counts["convolution"]
    # Zeros stand before the first frames alone.
    assert one.counts["constant_pad_nd"] < before.counts["constant_pad_nd"] / 4
    assert before.counts["add"] - one.counts["add"] == norms
    assert four.counts["convolution"] < one.counts["convolution"] / 2  # calls of 1, 4 and 4 frames, not of 1
    assert LEANER.keys() & {type(module) for module in vae.encoder.modules()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits_no_further_from_exact(dtype):
    vae = autoencoder("embedded")
    z = latents(vae, 4)
    exact = vae.decode(z).sample
    vae, z = vae.to(dtype), z.to(dtype)
    own = (vae.decode(z).sample - exact).abs().mean()
    decode_in_groups(vae, 2)
    assert (vae.decode(z).sample - exact).abs().mean() <= 1.2 * own


@pytest.mark.parametrize("known", [None, 1, 2])
def test_what_a_convolution_reads_keeps_its_order(known, monkeypatch):
    vae = autoencoder("wan2.1")
    decode_in_groups(vae, 2)
    convolution, last, seen = vae.decoder.conv_out, torch.channels_last_3d, []
    conv3d = torch.nn.functional.conv3d
    monkeypatch.setattr("torch.nn.functional.conv3d", lambda x, *given: seen.append(x) or conv3d(x, *given))
    x = torch.randn(1, convolution.in_channels, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=last)
    before = None if known is None else x[:, :, :known].clone()
    assert convolution(x, before).shape[2:] == x.shape[2:]
    assert seen[0].shape == (*x.shape[:2], 5, 4, 5)
    assert seen[0].is_contiguous(memory_format=last)


def test_norms_of_large_numbers_in_16_bits():
    """Their length is beyond float16."""
    vae = autoencoder("wan2.1", torch.float16)
    norm = vae.decoder.mid_block.resnets[0].norm1
    x = 3e4 * torch.randn(1, norm.gamma.shape[0], 2, 3, 4).sign().half()
    expected = norm(x)
    decode_in_groups(vae, 2)
    assert torch.allclose(norm(x), expected, rtol=2.0**-9, atol=0)
    assert expected.abs().min() > 0.4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_in_one_pass(dtype, device):
    """As in float64, within its own rounding; pixels of zeros stay zeros, and the order in memory stays."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 3, 5, 4, generator=generator)
    x[0, :, 1, 2, 3] = 0.0
    x[0, :, 1, 2, 2] *= 1e-6
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.rand(24, 1, 1, 1, generator=generator).to(device, dtype)
    found = in_one_pass(x, gamma)
    exact = torch.nn.functional.normalize(x.double(), dim=1) * 24**0.5 * gamma.double()
    # A square, a sum of 24 and a root for the norm, two products, and the rounding of what comes out.
    units = 30 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= units * exact.abs()).all())
    assert not found[0, :, 1, 2, 3].any()
    assert found.stride() == x.stride()


def test_offloading_layer_by_layer_keeps_its_hooks():
    """Before and after: accelerate puts its hook in place of a layer's forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Seen(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__mro__)
            return args, kwargs

    seen: list[tuple[type, ...]] = []
    for hooked_first in (True, False):
        vae = autoencoder("wan2.1")
        z = latents(vae, 3)
        expected = vae.decode(z).sample
        if hooked_first:
            add_hook_to_module(vae.decoder.conv_out, Seen())
        undo = decode_in_groups(vae, 2)
        if not hooked_first:
            add_hook_to_module(vae.decoder.conv_out, Seen())
        seen.clear()
        assert (vae.decode(z).sample - expected).abs().max() <= 1e-12
        assert len(seen) == 2
        undo()
        seen.clear()
        assert (vae.decode(z).sample - expected).abs().max() <= 1e-12
        assert len(seen) == 3
        remove_hook_from_module(vae.decoder.conv_out)
        assert torch.equal(vae.decode(z).sample, expected)


def test_encoding_is_left_alone():
    vae = autoencoder("wan2.1")
    pixels = torch.rand(1, 3, 9, 24, 32, dtype=torch.float64)
    expected = vae.encode(pixels).latent_dist.parameters
    undo = decode_in_groups(vae, 4)
    assert torch.equal(vae.encode(pixels).latent_dist.parameters, expected)
    vae.decode(latents(vae, 3))
    assert torch.equal(vae.encode(pixels).latent_dist.parameters, expected)
    undo()


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox", "ltx", "flux", "qwen-image"])
def test_other_autoencoders_are_refused(family):
    pipe = TINY[family].build()
    with pytest.raises(ValueError, match=rf"^vae=frames=4 is for AutoencoderKLWan, got {type(pipe.vae).__name__}\.$"):
        set_vae(pipe, "bf16,frames=4")
    assert pipe.vae.dtype == torch.float32


def test_within_a_pipeline_beside_other_settings():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe, output_type="pt")
    undo, said = set_vae(pipe, "frames=2, bf16,compiled")
    assert said == "autoencoder: bf16, compiled, frames=2"
    undo()
    undo, _ = set_vae(pipe, ["frames=2"])
    calls = []
    hook = pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    got = tiny.run(pipe, output_type="pt")
    assert len(calls) == 2  # three latent frames
    assert (got - plain).abs().max() <= 1e-5
    hook.remove()
    undo()
    assert torch.equal(tiny.run(pipe, output_type="pt"), plain)
