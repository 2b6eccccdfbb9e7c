"""Real architectures with random weights: published sizes, usable forwards, refused sizes."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode

import dit_accel
from dit_accel import presets
from dit_accel.benchmarking.forward import bench_forward
from dit_accel.patches.families import family_of
from dit_accel.pipelines.architectures import ARCHITECTURES, Architecture, architecture, first_output

# Parameters of the published transformers, in billions: model cards, to the cards' digits where diffusers has the
# exact number (Wan2.2-TI2V-5B 5.00, HunyuanVideo-1.5 8.3, LTX-2 19, Qwen-Image 20, MiniMax-H3 33, Z-Image 6).
BILLIONS = {
    "wan2.1-1.3b": 1.42,
    "wan2.1-14b": 14.29,
    "wan2.2-a14b": 14.29,
    "wan2.2-5b": 5.00,
    "hunyuanvideo": 12.82,
    "hunyuanvideo-1.5": 8.33,
    "cogvideox-5b": 5.57,
    "ltx": 1.92,
    "ltx2": 18.88,
    "minimax-h3": 33.12,
    "flux-dev": 11.90,
    "flux-kontext": 11.90,
    "qwen-image": 20.43,
    "z-image": 6.15,
}
# Heads, channels of a head, and blocks, as the cards and reports of the models have them.
SHAPES = {
    "wan2.1-1.3b": (12, 128, 30),
    "wan2.1-14b": (40, 128, 40),
    "wan2.2-a14b": (40, 128, 40),
    "wan2.2-5b": (24, 128, 30),
    "hunyuanvideo": (24, 128, 60),
    "hunyuanvideo-1.5": (16, 128, 54),
    "cogvideox-5b": (48, 64, 42),
    "ltx": (32, 64, 28),
    "ltx2": (32, 128, 48),
    "minimax-h3": (56, 128, 50),
    "flux-dev": (24, 128, 57),
    "flux-kontext": (24, 128, 57),
    "qwen-image": (24, 128, 60),
    "z-image": (30, 128, 30),
}
# Latent tokens at the default size: frames x rows x columns.
TOKENS = {
    "wan2.1-1.3b": 21 * 30 * 52,
    "wan2.1-14b": 21 * 45 * 80,
    "wan2.2-a14b": 21 * 45 * 80,
    "wan2.2-5b": 31 * 22 * 40,
    "hunyuanvideo": 33 * 45 * 80,
    "hunyuanvideo-1.5": 31 * 30 * 53,
    "cogvideox-5b": 13 * 30 * 45,
    "ltx": 21 * 15 * 22,
    "ltx2": 16 * 34 * 60,
    "minimax-h3": 37 * 24 * 42,
    "flux-dev": 64 * 64,
    "flux-kontext": 2 * 64 * 64,
    "qwen-image": 83 * 83,
    "z-image": 64 * 64,
}
NARROW = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "ffn_dim": 64},
    "LTXVideoTransformer3DModel": {"num_attention_heads": 2, "cross_attention_dim": 128},
    "LTX2VideoTransformer3DModel": {
        "num_attention_heads": 2,
        "cross_attention_dim": 256,
        "audio_num_attention_heads": 2,
        "audio_cross_attention_dim": 128,
        "caption_channels": 64,
    },
    "MiniMaxH3Transformer3DModel": {
        "num_attention_heads": 2,
        "hidden_size": 192,
        "ffn_dim": 64,
        "text_dim": 64,
        "time_embed_hidden_dim": 64,
        "time_embed_dim": 64,
    },
    "ZImageTransformer2DModel": {"n_heads": 2, "n_kv_heads": 2, "dim": 256, "cap_feat_dim": 64, "n_refiner_layers": 1},
    "HunyuanVideo15Transformer3DModel": {
        "num_attention_heads": 2,
        "text_embed_dim": 64,
        "text_embed_2_dim": 64,
        "image_embed_dim": 64,
    },
    "QwenImageTransformer2DModel": {"num_attention_heads": 2, "joint_attention_dim": 64},
}
CPU = torch.device("cpu")


def narrow(name: str) -> Architecture:
    """The architecture with two heads: the same code and geometry at a test's cost."""
    known = architecture(name)
    changes = NARROW.get(known.transformer, {"num_attention_heads": 2})
    return dataclasses.replace(known, config={**known.config, **changes})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_count_is_the_published_one(name: str) -> None:
    known = architecture(name)
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, known.transformer)(**known.config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_token_count_at_the_default_size(name: str) -> None:
    known = architecture(name)
    assert known.tokens(*known.size) == TOKENS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_and_depth_are_the_published_ones(name: str) -> None:
    known = architecture(name)
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, known.transformer)(**known.config)
    family = family_of(model)
    assert family is not None
    seen = [module for path, module in model.named_modules() if family.has_self_attention(path)]
    attention = next(module for module in seen if hasattr(module, "heads"))
    width = getattr(attention, "inner_dim", None) or attention.to_q.out_features
    assert (attention.heads, width // attention.heads, known.blocks) == SHAPES[name]


@pytest.mark.parametrize("name", [name for name, known in ARCHITECTURES.items() if not known.is_video])
def test_images_of_one_to_eight_thousand_pixels(name: str) -> None:
    known = architecture(name)
    for side in (1024, 2048, 4096, 8192):
        assert known.tokens(side, side, 1) == (1 + known.references) * (side // 16) ** 2
    # Tables of positions reach to the largest: the tensors of a forward have shapes, and no values.
    known = narrow(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = known.build(dtype=torch.bfloat16, device=CPU, layers=len(known.depth))
        given = known.make_inputs(model, width=8192, height=8192, frames=1, batch=1, dtype=torch.bfloat16, device=CPU)
        assert first_output(model(**given)).isnan().numel() >= 8192**2 // 64 * 16


def pooled_by_32(density: float) -> dit_accel.Recipe:
    """Blocks of which a test's clip has a few."""
    return presets.pooled(density=density).with_fields({"select.block": (32, 32)})


def small(known: Architecture) -> dict[str, int]:
    """A clip of three latent frames."""
    clip = known.clip
    frames = clip.first + -(-2 // clip.chunk_latents) * clip.chunk if known.is_video else 1
    return {"width": 192, "height": 128, "frames": frames}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("wan2.1-14b", "wan2.2-a14b")])
def test_forward_runs_and_the_family_finds_its_tokens(name: str, dtype: torch.dtype) -> None:
    known = narrow(name)
    model = known.build(dtype=dtype, device=CPU, layers=3)
    inputs = known.make_inputs(model, **small(known), batch=2, dtype=dtype, device=CPU)
    with torch.no_grad():
        dense = first_output(model(**inputs))
        with dit_accel.patch(model, pooled_by_32(0.5)) as handle:
            sparse = first_output(model(**inputs))
        summary = handle.summary()
        assert summary.sparse_calls == 3 + len(getattr(model, "noise_refiner", ()))
        assert summary.dense_calls == {}
        assert summary.density < 1
        with dit_accel.patch(model, pooled_by_32(1.0)) as handle:
            whole = first_output(model(**inputs))
        assert handle.summary().sparse_calls == summary.sparse_calls
    assert dense.isfinite().all()
    # The random model keeps activations at unit scale, so that half precision measures what it should.
    assert 0.3 < dense.float().std() < 3
    assert sparse.shape == dense.shape
    # All blocks are dense attention, but for sums in another order: a rounding in each of some dozens of operations.
    bound = 64 * torch.finfo(dtype).eps
    assert float((whole - dense).norm() / dense.norm()) < bound
    if dtype == torch.float32:
        assert float((sparse - dense).norm() / dense.norm()) > bound


def test_samples_that_come_as_a_list_are_timed_and_compared() -> None:
    report = bench_forward(
        narrow("z-image"),
        width=192,
        height=128,
        frames=1,
        recipe=pooled_by_32(1.0),
        dtype=torch.float32,
        device=CPU,
        batch=2,
        layers=1,
        repeats=1,
    )
    assert report.finite
    assert 0 < report.relative_difference < 64 * torch.finfo(torch.float32).eps
    assert report.summary.sparse_calls == 3 * 2  # of two warm-up forwards and one that counts


def test_inputs_are_the_same_at_every_call() -> None:
    known = narrow("wan2.1-1.3b")
    model = known.build(dtype=torch.float32, device=CPU, layers=1)
    sizes = {"width": 64, "height": 64, "frames": 5, "batch": 1, "dtype": torch.float32, "device": CPU}
    first, second = (known.make_inputs(model, **sizes)["hidden_states"] for _ in range(2))
    assert torch.equal(first, second)


def test_layers_keep_the_ratio_of_double_and_single_stream_blocks() -> None:
    model = narrow("hunyuanvideo").build(dtype=torch.float32, device=CPU, layers=6)
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 4)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("wan2.1-1.3b", (830, 480, 81), "multiples of 16, got 830x480"),
        ("wan2.1-1.3b", (832, 480, 80), "multiple of 4 frames plus one"),
        ("ltx", (720, 480, 161), "multiples of 32"),
        ("ltx", (704, 480, 13), "multiple of 8 frames plus one"),
        ("minimax-h3", (1344, 768, 121), "multiple of 17 frames plus 5, such as 124, got 121"),
        ("minimax-h3", (1344, 768, 4), "multiple of 17 frames plus 5"),
        ("flux-dev", (1024, 1024, 5), "frames must be 1"),
    ],
)
def test_impossible_sizes_are_refused(name: str, size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        architecture(name).latent_size(*size)


@pytest.mark.parametrize(("name", "layers"), [("wan2.1-1.3b", 0), ("wan2.1-1.3b", 31), ("flux-dev", 1)])
def test_impossible_depths_are_refused(name: str, layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers, got {layers}"):
        architecture(name).build(dtype=torch.float32, device=CPU, layers=layers)


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"Unknown architecture 'wan'; known are wan2\.1-1\.3b"):
        architecture("wan")
