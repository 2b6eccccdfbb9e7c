"""A whole run, timed: what is measured adds up, and a few blocks and steps stand for all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch

from dit_accel import presets
from dit_accel.benchmarking.block_clock import timed_blocks
from dit_accel.benchmarking.whole_run import RunTimes, bench_run
from dit_accel.cli.bench_run import _inside
from dit_accel.pipelines import whole
from dit_accel.pipelines.architectures import ARCHITECTURES
from tests.recipes import POOLED
from tests.tiny import TINY

SIZE = {"width": 64, "height": 64, "frames": 5, "dtype": torch.float32, "device": torch.device("cpu")}


def test_few_blocks_and_steps_stand_for_all():
    # 4 of 8 steps took 1 s each, of which 0.8 s in 2 of 6 blocks.
    times = RunTimes(text=0.5, steps=(1.0, 1.0, 1.0, 1.0), blocks=3.2, decode=2.0).of_all(num_steps=8, depth=3.0)
    assert times.steps == pytest.approx((1.0 + 2 * 0.8,) * 8)
    assert times.blocks == pytest.approx(8 * 3 * 0.8)
    assert times.total == pytest.approx(0.5 + 8 * 2.6 + 2.0)


def test_all_blocks_and_steps_are_left_alone():
    times = RunTimes(0.5, (1.0, 3.0), 1.0, 2.0)
    assert times.of_all(num_steps=2, depth=1.0) == times
    assert times.total == 6.5


@pytest.mark.parametrize("family", ["wan", "hunyuan", "flux"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_clock_runs_within_the_blocks_alone(family, compiled):
    tiny = TINY[family]
    pipe = tiny.build()
    if compiled:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    expected = tiny.run(pipe)
    before = [module._compiled_call_impl for module in pipe.transformer.modules()]
    with timed_blocks(pipe.transformer) as watch:
        assert torch.equal(tiny.run(pipe), expected)
        seconds = watch.seconds()
        assert seconds > 0.0
        pipe.transformer.proj_out(torch.zeros(1, pipe.transformer.proj_out.in_features))
        assert watch.seconds() == seconds
    assert [module._compiled_call_impl for module in pipe.transformer.modules()] == before
    torch._dynamo.reset()


def _with_narrow(monkeypatch, autoencoder, **config):
    """Many CPUs take minutes for one decoding at full width in 16 bits, which they only emulate."""
    monkeypatch.setattr(diffusers, autoencoder, partial(getattr(diffusers, autoencoder), **config))


@pytest.fixture
def tiny_architecture(monkeypatch):
    """Wan 2.1 as it is published, but narrow, and its text encoder and autoencoder likewise."""
    _with_narrow(monkeypatch, "AutoencoderKLWan", base_dim=8, num_res_blocks=1)
    wan = ARCHITECTURES["wan2.1-1.3b"]
    narrow = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 4}
    encoder = replace(
        whole._UMT5_XXL,
        settings={
            **whole._UMT5_XXL.settings,
            "vocab_size": 50,
            "d_model": 32,
            "d_ff": 16,
            "num_heads": 2,
            "num_layers": 1,
        },
    )
    monkeypatch.setitem(whole.WHOLE_PIPELINES, "tiny", replace(whole._WAN, encoders=(encoder,)))
    return replace(wan, name="tiny", config={**wan.config, **narrow})


def test_both_sides_of_a_tiny_run(tiny_architecture):
    report = bench_run(
        tiny_architecture, **SIZE, recipe=POOLED, num_steps=3, dense_steps=2, layers=2, repeats=2, vae="bf16"
    )
    assert [len(times.steps) for times in report.dense] == [2, 2]
    assert [len(times.steps) for times in report.fast] == [3, 3]
    assert report.depth == 2.0
    assert report.finite
    assert report.summary.sparse_calls
    assert report.summary.changes == ("autoencoder: bf16",)
    for times in (*report.dense, *report.fast):
        assert 0.0 < times.blocks < sum(times.steps)
        assert times.decode > 0.0
        assert times.text > 0.0
    data = report.to_dict()
    assert data["speedup"] == pytest.approx(report.speedup.median)
    assert [run["total"] for run in data["fast"]["whole"]] == [times.total for times in report.whole(report.fast)]
    assert len(data["notes"]) == 2


def _narrow(encoder, **changes):
    settings = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    return replace(encoder, settings={**encoder.settings, **settings, **changes})


@pytest.fixture
def tiny_hunyuan(monkeypatch):
    """HunyuanVideo as it is published, but narrow, and its text encoders and autoencoder likewise."""
    width = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    _with_narrow(monkeypatch, "AutoencoderKLHunyuanVideo", **width)
    hunyuan, whole_one = ARCHITECTURES["hunyuanvideo"], whole.WHOLE_PIPELINES["hunyuanvideo"]
    narrow = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
    }
    encoders = (
        _narrow(whole._LLAMA_8B, num_attention_heads=2, num_key_value_heads=1),
        _narrow(whole._CLIP_L, num_attention_heads=2),
    )
    monkeypatch.setitem(whole.WHOLE_PIPELINES, "tiny-hunyuan", replace(whole_one, encoders=encoders))
    return replace(hunyuan, name="tiny-hunyuan", config={**hunyuan.config, **narrow})


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_the_profile_fast_runs_from_text_to_frames(name, request):
    architecture = request.getfixturevalue({"wan": "tiny_architecture", "hunyuan": "tiny_hunyuan"}[name])
    report = bench_run(architecture, **SIZE, recipe=presets.fast(), num_steps=12, dense_steps=2)
    assert [len(times.steps) for times in report.fast] == [12]
    assert report.finite
    data = report.to_dict()["summary"]
    # Of twelve steps nine run all blocks, of the ten of the warm-up eight.
    assert data["computed_share"] == pytest.approx((9 + 8) / (12 + 10))
    assert report.summary.dense_calls["search step"]
    text = "\n".join(_inside(data))
    assert "accelerated side: 0.77 of the forwards ran all blocks" in text
    assert all(word in text for word in ("s sparse", "s dense", "s planning"))


def test_fp8_without_a_gpu_is_refused_before_anything_is_built(tiny_architecture, monkeypatch):
    pytest.importorskip("torchao", reason="the extra dit-accel[compile] is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"linear='fp8' needs a GPU of compute capability 8\.9 or newer, got a CPU"):
        bench_run(tiny_architecture, **SIZE, recipe=presets.fast(), linear="fp8", progress=pytest.fail)


def test_the_profile_fast_with_linear_layers_in_8_bits(tiny_architecture):
    pytest.importorskip("torchao", reason="the extra dit-accel[compile] is not installed")
    wide = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2}
    architecture = replace(tiny_architecture, config={**tiny_architecture.config, **wide})
    report = bench_run(
        architecture,
        **(SIZE | {"dtype": torch.bfloat16}),
        recipe=presets.fast(),
        num_steps=9,
        dense_steps=1,
        linear="int8",
    )
    assert report.finite
    assert report.summary.skipped_forwards
    (change,) = report.summary.changes
    # Two attentions of four layers each and a feed-forward of two, in two blocks.
    assert change.startswith("linear layers: 20 in int8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"dense_steps": 0}, "dense_steps must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"vae": "fast"}, "vae takes some of"),
        ({"width": 65}, "needs width and height in multiples of 16, got 65x64"),
    ],
)
def test_bad_input_is_one_sentence(tiny_architecture, changes, said):
    with pytest.raises(ValueError, match=said):
        bench_run(tiny_architecture, **(SIZE | {"recipe": POOLED} | changes))


def test_an_architecture_without_a_pipeline_is_refused():
    with pytest.raises(ValueError, match=r"Whole runs are known of .*, hunyuanvideo, got ltx"):
        bench_run(ARCHITECTURES["ltx"], **SIZE, recipe=None)


@pytest.mark.parametrize(("name", "dtype"), [("wan2.1-1.3b", torch.float32), ("hunyuanvideo", torch.float16)])
def test_the_autoencoder_has_the_precision_of_diffusers_own_example(monkeypatch, name, dtype):
    """HunyuanVideo's, in float32, needs minutes for a clip of 1280 x 720. On a CPU float16 would."""
    asked = []
    monkeypatch.setattr(whole, "materialise", lambda _model, given, _device: asked.append(given))
    for device in ("cuda", "cpu"):
        whole.WHOLE_PIPELINES[name].build_autoencoder(torch.device(device))
    assert asked == [dtype, torch.float32]
