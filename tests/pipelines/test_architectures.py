"""Real architectures with random weights: published sizes, usable forwards, refused sizes."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

import dit_accel
from dit_accel.pipelines.architectures import ARCHITECTURES, Architecture, architecture

# Parameters of the published transformers, in billions, from their model cards.
BILLIONS = {
    "wan2.1-1.3b": 1.42,
    "wan2.1-14b": 14.29,
    "wan2.2-a14b": 14.29,
    "hunyuanvideo": 12.82,
    "flux-dev": 11.90,
    "cogvideox-5b": 5.57,
    "ltx": 1.92,
}
# Latent tokens at the default size: frames x rows x columns.
TOKENS = {
    "wan2.1-1.3b": 21 * 30 * 52,
    "wan2.1-14b": 21 * 45 * 80,
    "wan2.2-a14b": 21 * 45 * 80,
    "hunyuanvideo": 33 * 45 * 80,
    "flux-dev": 64 * 64,
    "cogvideox-5b": 13 * 30 * 45,
    "ltx": 21 * 15 * 22,
}
NARROW = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "ffn_dim": 64},
    "LTXVideoTransformer3DModel": {"num_attention_heads": 2, "cross_attention_dim": 128},
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "hunyuanvideo", "flux-dev", "cogvideox-5b", "ltx"])
def test_forward_runs_and_the_family_finds_its_tokens(name: str, dtype: torch.dtype) -> None:
    known = narrow(name)
    size = {"width": 192, "height": 128, "frames": 9 if known.is_video else 1}
    model = known.build(dtype=dtype, device=CPU, layers=3)
    inputs = known.make_inputs(model, **size, batch=2, dtype=dtype, device=CPU)
    with torch.no_grad():
        dense = model(**inputs)[0]
        with dit_accel.patch(model, "pooled", density=0.5) as handle:
            sparse = model(**inputs)[0]
    summary = handle.summary()
    assert summary.sparse_calls == 3
    assert summary.dense_calls == {}
    assert dense.isfinite().all()
    # The random model keeps activations at unit scale, so that half precision measures what it should.
    assert 0.3 < dense.float().std() < 3
    assert sparse.shape == dense.shape


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
